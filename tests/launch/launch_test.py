"""The launch scripts: what they would run, and how the queue of TPUs outlives preemptions."""

import json
import pathlib
import shlex
import shutil
import stat
import subprocess
import sys

from absl.testing import absltest
from absl.testing import parameterized

ROOT = pathlib.Path(__file__).resolve().parents[2]

REQUIRED = {
  'gke_xpk': {
    'PROJECT': 'p',
    'ZONE': 'z',
    'CLUSTER': 'c',
    'WORKLOAD': 'w',
    'TPU_TYPE': 'v5-16',
    'DOCKER_IMAGE': 'i',
    'WORKDIR': '/mnt/shared/a run',
  },
  'gpu': {},
  'slurm': {'GPUS_PER_NODE': '4'},
  'tpu_pod': {
    'TPU_NAME': 'tpu',
    'ZONE': 'z',
    'PROJECT': 'p',
    'REPO': 'https://host/a b.git',
    'WORKDIR': '/mnt/shared/a run',
  },
  'tpu_queued': {
    'TPU_NAME': 'tpu',
    'ZONE': 'z',
    'PROJECT': 'p',
    'REPO': 'https://host/a b.git',
    'WORKDIR': '/mnt/shared/a run',
    'ACCELERATOR_TYPE': 'v5-16',
    'RUNTIME_VERSION': 'v2',
  },
  'tpu_vm': {
    'TPU_NAME': 'tpu',
    'ZONE': 'z',
    'PROJECT': 'p',
    'REPO': 'https://host/a b.git',
    'ACCELERATOR_TYPE': 'v5-8',
    'RUNTIME_VERSION': 'v2',
  },
}
"""Scripts, and the variables that each cannot do without."""

TOOL = {
  'gke_xpk': 'xpk',
  'slurm': 'srun',
  'tpu_pod': 'gcloud',
  'tpu_queued': 'gcloud',
  'tpu_vm': 'gcloud',
}
"""What has to be installed where a script runs."""

BASICS = ('bash', 'basename', 'date', 'dirname', 'env', 'seq', 'sleep')
"""All that scripts may take for granted. Tests see nothing else, so they reach no real cloud."""

ARGUMENTS = ('--config.sample.prompt=a "red" fox, it\'s $HOME  and `snow`; & \\ *', '--config.x=')

GCLOUD = r"""
import json, sys

path = __file__.replace('gcloud', 'world.json')
with open(path) as file:
  world = json.load(file)
arguments = sys.argv[1:]
world['calls'].append(arguments)
action, status, answer = arguments[3], 0, ''
if action == 'create':
  status = 1 if world['states'] else world['refusals'].pop(0) if world['refusals'] else 0
  if not status:
    world['states'] = world['coming'].pop(0)
elif action == 'describe':
  if world['states']:
    answer, *later = world['states']
    world['states'] = later or [answer]  # The last state stays.
  status = 0 if answer else 1
elif action == 'delete':
  status, world['states'] = 0 if world['states'] else 1, []
elif action == 'ssh' and 'lvrpo_jax.main' in arguments[-1]:
  status, states = world['jobs'].pop(0)
  world['states'] = states or world['states']
with open(path, 'w') as file:
  json.dump(world, file)
print(answer)
sys.exit(status)
"""
"""A cloud of one resource. `coming` holds its states after each request, `refusals` the statuses of
requests before one is granted, `jobs` for each start its status and the states from then on."""


def shellcheck() -> str:
  """Path of the program, also where the virtual environment is not activated."""
  path = shutil.which('shellcheck') or shutil.which(
    'shellcheck', path=str(pathlib.Path(sys.executable).parent)
  )
  if not path:
    raise AssertionError("shellcheck is not installed: pip install -e '.[test]'")
  return path


def python_arguments(line: str) -> list[str]:
  """Arguments of the job in a printed line, through the layer of a remote shell.

  Raises:
    AssertionError: the line starts no job.
  """
  words = shlex.split(line)
  commands = [word.removeprefix('--command=') for word in words if word.startswith('--command=')]
  words = shlex.split(commands[0]) if commands else words
  for number, word in enumerate(words):
    if word.endswith('python') and words[number + 1 : number + 3] == ['-m', 'lvrpo_jax.main']:
      return words[number + 3 :]
  raise AssertionError(f'no job in {line!r}')


class LaunchTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.bin = pathlib.Path(self.create_tempdir().full_path)
    for name in BASICS:
      (self.bin / name).symlink_to(shutil.which(name))

  def program(self, name: str, source: str) -> pathlib.Path:
    """Puts a Python program on the PATH of the scripts."""
    path = self.bin / name
    path.write_text(f'#!{sys.executable} -IS\n{source}')
    path.chmod(0o755)
    return path

  def recorder(self, name: str, source: str = '') -> pathlib.Path:
    """Puts a program on the PATH that appends its arguments to a file, then does more."""
    calls = self.bin / f'{name}.calls'
    self.program(
      name,
      f'import json, sys\nwith open({str(calls)!r}, "a") as file:\n'
      f'  print(json.dumps(sys.argv[1:]), file=file)\n{source}',
    )
    return calls

  def launch(
    self, script: str | pathlib.Path, *arguments: str, **variables: str
  ) -> subprocess.CompletedProcess:
    """Runs a script in a world that holds nothing but the programs of this test."""
    path = script if isinstance(script, pathlib.Path) else ROOT / 'launch' / f'{script}.sh'
    return subprocess.run(
      [path, *arguments],
      capture_output=True,
      text=True,
      timeout=60,
      cwd=self.bin,
      env={'PATH': str(self.bin), 'HOME': '/home/x'} | variables,
    )

  def cloud(self, jobs, coming=(('WAITING_FOR_RESOURCES', 'ACTIVE'),), states=(), refusals=()):
    """Puts a gcloud on the PATH."""
    (self.bin / 'world.json').write_text(
      json.dumps(
        {'jobs': jobs, 'coming': coming, 'states': states, 'refusals': refusals, 'calls': []}
      )
    )
    self.program('gcloud', GCLOUD)

  def calls(self, action: str) -> list[list[str]]:
    """What gcloud was asked, by action."""
    calls = json.loads((self.bin / 'world.json').read_text())['calls']
    return [call for call in calls if call[3] == action]

  def starts(self) -> list[str]:
    """Commands by which the cloud was asked to start jobs."""
    return [call[-1] for call in self.calls('ssh') if 'lvrpo_jax.main' in call[-1]]

  def queued(self, **variables: str) -> subprocess.CompletedProcess:
    return self.launch(
      'tpu_queued',
      *ARGUMENTS,
      **(REQUIRED['tpu_queued'] | {'POLL': '0', 'SETTLE': '0'} | variables),
    )

  def test_every_script_is_known_and_executable(self):
    scripts = set((ROOT / 'launch').glob('*.sh')) - {ROOT / 'launch' / 'common.sh'}
    self.assertEqual({path.stem for path in scripts}, set(REQUIRED))
    for path in scripts:
      self.assertTrue(path.stat().st_mode & stat.S_IXUSR, path)

  def test_shellcheck(self):
    scripts = sorted(path.relative_to(ROOT) for path in (ROOT / 'launch').glob('*.sh'))
    self.assertNotEmpty(scripts)
    check = subprocess.run(
      [shellcheck(), '--external-sources', *scripts], cwd=ROOT, capture_output=True, text=True
    )
    self.assertEqual(check.returncode, 0, check.stdout + check.stderr)

  @parameterized.parameters(*REQUIRED)
  def test_dry_run(self, script):
    out = self.launch(script, '--dry-run', *ARGUMENTS, **REQUIRED[script])
    self.assertEqual(out.returncode, 0, out.stderr)
    jobs = [line for line in out.stdout.splitlines() if 'lvrpo_jax.main' in line]
    self.assertLen(jobs, 1)
    workdir = REQUIRED[script].get('WORKDIR', 'runs/bagel_7b')
    self.assertEqual(
      python_arguments(jobs[0]),
      ['--config=configs/bagel_7b.py', f'--workdir={workdir}', *ARGUMENTS],
    )

  @parameterized.parameters(*REQUIRED)
  def test_config_and_workdir(self, script):
    out = self.launch(
      script,
      '--dry-run',
      **(REQUIRED[script] | {'CONFIG': 'my configs/a.py', 'WORKDIR': '/mnt/"a"'}),
    )
    job = [line for line in out.stdout.splitlines() if 'lvrpo_jax.main' in line][0]
    self.assertEqual(python_arguments(job), ['--config=my configs/a.py', '--workdir=/mnt/"a"'])

  def test_dry_run_prints_every_command(self):
    out = self.launch('tpu_queued', '--dry-run', **REQUIRED['tpu_queued'])
    commands = [shlex.split(line) for line in out.stdout.splitlines()]
    self.assertEqual(
      [command[3:5] for command in commands],
      [
        ['queued-resources', 'describe'],
        ['queued-resources', 'create'],
        ['tpu-vm', 'ssh'],
        ['tpu-vm', 'ssh'],
        ['queued-resources', 'delete'],
      ],
    )
    self.assertContainsSubset(
      [
        '--node-id=tpu',
        '--accelerator-type=v5-16',
        '--spot',
        '--runtime-version=v2',
        '--zone=z',
        '--project=p',
      ],
      commands[1],
    )
    self.assertContainsSubset(['--worker=all', '--zone=z', '--project=p'], commands[3])
    out = self.launch('tpu_vm', '--dry-run', **REQUIRED['tpu_vm'])
    self.assertEqual(
      [shlex.split(line)[4] for line in out.stdout.splitlines()],
      ['describe', 'create', 'ssh', 'ssh'],
    )

  @parameterized.parameters(*((script, name) for script in REQUIRED for name in REQUIRED[script]))
  def test_missing_variable_is_named(self, script, name):
    variables = {key: value for key, value in REQUIRED[script].items() if key != name}
    out = self.launch(script, '--dry-run', **variables)
    self.assertNotEqual(out.returncode, 0)
    self.assertRegex(out.stderr, rf'\b{name}: \w')
    self.assertEmpty(out.stdout)

  @parameterized.parameters(*TOOL.items())
  def test_missing_tool_is_named(self, script, tool):
    out = self.launch(script, **(REQUIRED[script] | {'SLURM_JOB_ID': '7'}))
    self.assertEqual(out.returncode, 127)
    self.assertIn(f'{tool} is not installed. ', out.stderr)

  def test_remote_shell(self):
    """A shell does with the command over ssh what shlex says, in the folder of the checkout."""
    line = self.launch(
      'tpu_pod', '--dry-run', *ARGUMENTS, **REQUIRED['tpu_pod']
    ).stdout.splitlines()[-1]
    command = shlex.split(line)[-1].removeprefix('--command=')
    home = pathlib.Path(self.create_tempdir().full_path)
    (home / 'lvrpo_jax/.venv/bin').mkdir(parents=True)
    calls = self.recorder('python', 'import os; print(os.getcwd()); sys.exit(143)')
    (self.bin / 'python').rename(home / 'lvrpo_jax/.venv/bin/python')
    locks = self.recorder('flock')
    out = subprocess.run(
      ['bash', '-c', command],
      capture_output=True,
      text=True,
      cwd=home,
      env={'PATH': str(self.bin), 'HOME': str(home)},
    )
    self.assertEqual((out.stdout.strip(), out.stderr), (str(home / 'lvrpo_jax'), ''))
    self.assertEqual(out.returncode, 143)
    self.assertEqual(
      json.loads(calls.read_text()), ['-m', 'lvrpo_jax.main', *python_arguments(line)]
    )
    self.assertEqual(json.loads(locks.read_text()), ['9'])

  def test_setup_of_workers(self):
    line = self.launch(
      'tpu_pod', '--dry-run', **(REQUIRED['tpu_pod'] | {'REF': 'a branch'})
    ).stdout.splitlines()[0]
    words = shlex.split(shlex.split(line)[-1].removeprefix('--command='))
    self.assertContainsSubset(['https://host/a b.git', 'a branch', '.[tpu]'], words)

  @parameterized.parameters((True, 0), (False, 1))
  def test_vm_is_created_unless_it_exists(self, exists, creations):
    self.cloud(jobs=[[3, []]], states=['READY'] if exists else [])
    out = self.launch('tpu_vm', *ARGUMENTS, **REQUIRED['tpu_vm'])
    self.assertEqual(out.returncode, 3, out.stderr)
    self.assertLen(self.calls('create'), creations)
    self.assertLen(self.starts(), 1)

  @parameterized.parameters(
    ('v5litepod-16', '', False),
    ('v5p-64', 'runs/a', False),
    ('v6e-256', '~/a', False),
    ('v5litepod-16', '/mnt/a', True),
    ('v5litepod-8', '', True),
    ('v6e-4', 'runs/a', True),
  )
  def test_hosts_of_a_slice_share_their_workdir(self, accelerator, workdir, good):
    out = self.launch(
      'tpu_vm',
      '--dry-run',
      **REQUIRED['tpu_vm'] | {'ACCELERATOR_TYPE': accelerator, 'WORKDIR': workdir},
    )
    self.assertEqual(out.returncode, 0 if good else 1, out.stderr)
    if not good:
      self.assertRegex(out.stderr, f'WORKDIR: .* every host of a {accelerator}; name one on a disk')
      self.assertEmpty(out.stdout)

  @parameterized.named_parameters(
    ('saved', 143, ['SUSPENDED']),
    ('saved_before_the_state_shows_it', 143, ['ACTIVE', 'ACTIVE', 'SUSPENDING', 'SUSPENDED']),
    ('connection_lost', 255, ['FAILED']),
    ('peer_lost', 1, ['SUSPENDED']),
  )
  def test_preempted_once(self, status, states):
    self.cloud(
      jobs=[[status, states], [0, []]],
      coming=[['WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE']] * 2,
    )
    out = self.queued(SETTLE='20')
    self.assertEqual(out.returncode, 0, out.stderr)
    self.assertLen(self.calls('create'), 2)
    self.assertLen(self.calls('delete'), 1)
    first, second = self.starts()
    self.assertEqual(first, second)
    self.assertContainsSubset(ARGUMENTS, shlex.split(second))
    self.assertIn('PROVISIONING', out.stderr)
    self.assertIn('restart 1 of 20', out.stderr)

  @parameterized.parameters(1, 2, 143, 255)
  def test_failure_on_an_active_slice_ends(self, status):
    self.cloud(jobs=[[status, []]])
    out = self.queued()
    self.assertEqual(out.returncode, status, out.stderr)
    self.assertLen(self.starts(), 1)
    self.assertEmpty(self.calls('delete'))
    self.assertEqual(
      shlex.split(out.stdout.splitlines()[-1])[:6],
      ['gcloud', 'compute', 'tpus', 'queued-resources', 'delete', 'tpu'],
    )

  def test_slice_that_never_comes_is_requested_again(self):
    self.cloud(jobs=[[0, []]], coming=[['FAILED'], ['PROVISIONING', 'SUSPENDED'], ['ACTIVE']])
    out = self.queued()
    self.assertEqual(out.returncode, 0, out.stderr)
    self.assertLen(self.calls('create'), 3)
    self.assertLen(self.starts(), 1)

  def test_silence_ends(self):
    """After three looks in a row, one before the request, and one that shows the error."""
    self.cloud(jobs=[], coming=[['PROVISIONING', '', '', 'PROVISIONING', '']])
    out = self.queued(MAX_SILENT='3')
    self.assertEqual(out.returncode, 1)
    self.assertIn(
      'tpu: given up, its state was asked 3 times in a row without an answer', out.stderr
    )
    self.assertLen(self.calls('describe'), 1 + 4 + 3 + 1)
    self.assertLen(self.calls('create'), 1)
    self.assertEmpty(self.calls('delete'))
    self.assertEmpty(self.starts())

  def test_existing_slice_is_used(self):
    self.cloud(jobs=[[0, []]], states=['ACTIVE'])
    self.assertEqual(self.queued().returncode, 0)
    self.assertEmpty(self.calls('create'))

  def test_refused_request(self):
    self.cloud(jobs=[], refusals=[1])
    out = self.queued()
    self.assertEqual(out.returncode, 1)
    self.assertLen(self.calls('create'), 1)
    self.cloud(jobs=[[143, ['SUSPENDED']], [0, []]], refusals=[0, 1], coming=[['ACTIVE']] * 2)
    self.assertEqual(self.queued().returncode, 0)
    self.assertLen(self.calls('create'), 3)

  def test_restarts_are_limited(self):
    self.cloud(jobs=[[143, ['SUSPENDED']]] * 9, coming=[['ACTIVE']] * 9)
    out = self.queued(MAX_RESTARTS='2')
    self.assertEqual(out.returncode, 143)
    self.assertLen(self.starts(), 3)
    self.assertIn('given up after 2 restarts', out.stderr)

  @parameterized.parameters(
    (0, 'RUNNING', 0, 0), (1, 'RUNNING', 1, 0), (143, 'RUNNING', 0, 1), (143, 'COMPLETING', 143, 0)
  )
  def test_slurm_queues_again_what_was_saved(self, status, state, wanted, requeues):
    spool = pathlib.Path(self.create_tempdir().full_path) / 'slurm_script'
    shutil.copy(ROOT / 'launch/slurm.sh', spool)  # As SLURM does it.
    steps = self.recorder('srun', f'sys.exit({status})')
    requeue = self.recorder('scontrol')
    self.program('squeue', f'print({state!r})')
    out = self.launch(
      spool, *ARGUMENTS, SLURM_SUBMIT_DIR=str(ROOT), SLURM_JOB_ID='7', SLURM_GPUS_ON_NODE='4'
    )
    self.assertEqual(out.returncode, wanted, out.stderr)
    step = json.loads(steps.read_text())
    self.assertEqual(step[:2], ['env', 'JAX_LOCAL_DEVICE_IDS=0,1,2,3'])
    self.assertContainsSubset(ARGUMENTS, step)
    self.assertEqual(
      requeue.read_text().splitlines() if requeue.exists() else [], ['["requeue", "7"]'] * requeues
    )

  def test_slurm_wants_to_be_submitted(self):
    out = self.launch('slurm', **REQUIRED['slurm'])
    self.assertNotEqual(out.returncode, 0)
    self.assertIn('sbatch launch/slurm.sh', out.stderr)

  def test_xpk_starts_python_in_place_of_its_shell(self):
    calls = self.recorder('xpk')
    self.launch('gke_xpk', *ARGUMENTS, **REQUIRED['gke_xpk'])
    call = json.loads(calls.read_text())
    self.assertEqual(call[:2], ['workload', 'create'])
    self.assertContainsSubset(
      ['--cluster=c', '--workload=w', '--tpu-type=v5-16', '--docker-image=i', '--num-slices=1'],
      call,
    )
    self.assertStartsWith(call[-1], '--command=exec python -m lvrpo_jax.main ')

  @parameterized.parameters((True, 0), (False, 2))
  def test_gpu_installs_what_is_missing(self, installed, installations):
    venv = pathlib.Path(self.create_tempdir().full_path) / 'venv'
    calls = self.recorder('python', f'sys.exit({int(not installed)} if sys.argv[1] == "-c" else 0)')
    (venv / 'bin').mkdir(parents=True)
    (self.bin / 'python').rename(venv / 'bin/python')
    (self.bin / 'python3').symlink_to(venv / 'bin/python')
    out = self.launch('gpu', *ARGUMENTS, VENV=str(venv))
    self.assertEqual(out.returncode, 0, out.stderr)
    probe, *others, job = [json.loads(line) for line in calls.read_text().splitlines()]
    self.assertEqual(probe[0], '-c')
    self.assertLen(others, installations)
    self.assertEqual(job[:2], ['-m', 'lvrpo_jax.main'])
    self.assertContainsSubset(ARGUMENTS, job)


if __name__ == '__main__':
  absltest.main()
