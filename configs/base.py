"""The default job: a small unified model on the shapes world, pretrained and aligned.

    python -m lvrpo_jax.main --config=configs/base.py

The job runs on two CPU cores without an accelerator. This file holds every key once, with its unit
and meaning. Other configs import it and assign. `get_config` lists the sections; one function below
it describes each of them.
"""

import copy
from typing import Any

from ml_collections import config_dict

TASKS = ('generate', 'understand', 'edit', 'think_generate')
Section = config_dict.ConfigDict
Config = Any
"""A `Section` whose keys have any type; the stubs of ConfigDict know a few types only."""


def get_config() -> Config:
  """Returns the default configuration."""
  config = Section()
  # 'train': all stages; 'pretrain': stages before alignment; 'control': more pretraining instead of
  # alignment; 'study': many such runs, see configs/study.py; 'sample': one answer or image;
  # 'convert': imports a released model or exports an aligned one; 'describe': prints the layout of
  # parameters on the mesh; 'compile': compiles alignment for TPUs that need not be present
  config.program = 'train'
  config.seed = 0  # of initialisation, data, rollouts and noise
  config.checkpoint = ''  # folder of a released model; '' trains the small one of config.model
  # Sizes of the released model in its own format, see configs/bagel_7b.py; empty: the folder's
  config.architecture = Section()
  config.data = data()
  config.model = model()  # the small unified model
  config.vae = vae()  # the small autoencoder
  config.dual_encoder = dual_encoder()  # the small SigLIP that scores and aligns features
  config.pretrain = pretrain()
  config.control = control()  # continued pretraining, see configs/base_control.py
  config.align = align()  # reinforcement: rollouts, rewards, advantages, updates
  config.evaluate = evaluate()  # scores before and after alignment
  config.sample = sample()
  config.convert = convert()
  config.compile = compile_ahead()
  config.study = study()
  config.parallel = parallel()
  config.log_every = 10  # seconds between log lines where there is no terminal
  config.report = True  # write report.html at the end
  return config


def data() -> Section:
  """Source and encoding of prompts, images and answers."""
  c = Section()
  c.source = 'shapes'  # name in data/examples.py, or the import path 'module:Class' of your own
  c.prompt_tokens = 14  # of the longest caption, question or instruction
  c.answer_tokens = 14  # of the longest answer, reasoning included
  c.uniform = True  # one row shape for all tasks, which one pass encodes; less to compile
  c.prefetch = 4  # batches prepared ahead in the background
  c.options = Section()  # arguments of the source, which receives those that its constructor names
  c.options.wrong = 0.1  # fraction of wrong answers without a plan in pretraining, as on the web
  c.options.chatty = 0.1  # fraction of answers without a plan that violate the format
  c.options.plan = 0.7  # fraction of answers that reason first, where one word is not enough
  c.options.describe = 0.3  # fraction of pretraining questions that ask for the whole image
  c.options.drop = 0.1  # probability of leaving the text out, which is needed for guidance
  c.options.generate_kinds = Section(  # relative frequency in training
    dict(single_object=2.0, two_object=3.0, counting=3.0, colors=2.0, position=7.0, color_attr=3.0)
  )
  c.options.question_kinds = Section(  # relative frequency in training
    dict(color=1.0, shape=1.0, count=3.0, relation=6.0, compare=3.0, reason=3.0)
  )
  return c


def model() -> Section:
  """Sizes of the small model; dtype, unroll, remat and attention apply to released ones too."""
  c = Section()
  c.family = 'bagel'  # name in models/family.py, or the import path of your own
  c.width = 96  # residual stream of both experts
  c.depth = 4  # layers
  c.heads = 2  # query heads; width / heads is the head width and must be even
  c.kv_heads = 1  # key/value heads; must divide heads
  c.ff_width = 256  # feed-forward width of each expert
  c.rope_theta = 1e4  # base of the rotary positions
  c.position_side = 16  # rows and columns of the position tables; images are stretched over them
  c.eps = 1e-6  # of the norms
  c.dtype = 'float32'  # compute dtype; parameters are float32
  c.unroll = 4  # layers unrolled per scan step; depth is fastest on CPU, 1 elsewhere
  c.remat = 'none'  # 'none', 'full', or a name in jax.checkpoint_policies
  # 'xla' (any mask), 'splash' (Pallas, TPU), 'cudnn' (GPU, 16 bits), or 'auto' by backend
  c.attention = 'auto'
  c.vit_width = 96  # vision tower
  c.vit_depth = 1
  c.vit_heads = 4
  c.vit_ff_width = 256
  c.vit_patch = 16  # pixels a side
  return c


def vae() -> Section:
  """The linear autoencoder that is fitted in closed form."""
  c = Section()
  c.patch = 16  # pixels a side of one latent token
  c.channels = 40  # values of a latent token
  c.whiten = 0.5  # 1: latents of unit deviation; 0: principal components as they are
  c.images = 3000  # training images that the autoencoder is fitted to
  return c


def dual_encoder() -> Section:
  """The SigLIP dual encoder of the semantic reward: weights of a folder, or trained in the job."""
  c = Section()
  c.path = ''  # folder of SigLIP or SigLIP-2 in Hugging Face's form; '' trains the one below
  c.width = 96  # of both towers and the joint space
  c.depth = 1  # layers of each tower
  c.heads = 4
  c.ff_width = 256
  c.patch = 16  # pixels a side
  c.steps = 300  # training steps
  c.batch = 64  # image-text pairs a step
  c.learning_rate = 2e-3
  return c


def optimizer(**changes) -> Section:
  """An optimizer; gradients are clipped by their global norm first."""
  c = Section()
  c.kind = 'adamw'  # 'adamw', or 'muon' for the kernels of the trunk's layers
  c.learning_rate = 2e-3  # peak, of AdamW
  c.muon_rate = 2e-2  # peak learning rate of the kernels under 'muon'
  c.schedule = 'linear'  # 'linear': flat, then to 0 from half time; 'cosine' to 0; or 'constant'
  c.warmup = 20  # steps
  c.b1 = 0.9  # decay of the momentum
  c.b2 = 0.98  # decay of the second moment
  # Added to the root of the second moment. Parameters whose gradients are below it hardly change;
  # their share is logged, see `align.checks.gradients_every`
  c.eps = 1e-8
  c.weight_decay = 0.01  # on kernels
  c.clip_norm = 1.0  # of the global gradient norm
  c.update(changes)
  return c


def pretrain() -> Section:
  """Supervised training on answers (next token) and images (flow matching)."""
  c = Section()
  c.steps = 800
  # Captions, questions, edits, and captions with a plan before the image, per step; 0 leaves a task
  # out
  c.rows = Section(dict(generate=48, understand=48, edit=24, think_generate=0))
  c.task_weights = Section(dict.fromkeys(TASKS, 1.0))  # of the losses
  c.draws = 2  # noised copies of every image; they share one encoded context
  c.shift = 2.2  # time shift of the logit-normal training times
  c.ema = 0.0  # decay of the running mean of parameters; 0 keeps none
  c.save_every = 200  # steps
  c.optimizer = optimizer(kind='muon')
  return c


def control() -> Section:
  """Continued pretraining."""
  c = Section()
  c.steps = 600
  c.rate = 0.5  # factor of the pretraining learning rates
  c.repa = 0.0  # weight of representation alignment (REPA uses 0.5); 0 leaves it out
  c.repa_layer = 2  # layers after which states are aligned
  return c


def align() -> Section:
  """Alignment; an iteration consists of rollout, rewards, advantages and updates."""
  c = Section()
  c.iterations = 70
  c.updates_per_rollout = 2  # optimizer steps
  # Prompts an iteration; 0 leaves a task out. 'think_generate' samples a text plan and the image
  # after it as one trajectory with one reward, see configs/think.py
  c.prompts = Section(dict(generate=16, understand=32, edit=8, think_generate=0))
  c.task_weights = Section(dict.fromkeys(TASKS, 1.0))  # of the losses
  c.rollout = rollout()
  c.dynamic_sampling = Section()  # DAPO: replaces prompts whose samples all have the same score
  c.dynamic_sampling.rounds = 0  # of fresh prompts; 0 leaves it out
  c.dynamic_sampling.reward = 'rules'  # the reward that must vary in a group; '': any
  c.rewards = rewards()
  c.remote_judge = remote_judge()
  c.advantage = advantage()
  c.text = text()
  c.image = image()
  c.optimizer = optimizer(learning_rate=3e-4, schedule='constant', warmup=10, weight_decay=0.0)
  c.optimizer.understanding_rate = 0.3  # multiplier of the rate for the understanding expert
  c.lora = Section()  # adapters instead of all parameters
  c.lora.rank = 0  # 0 trains all parameters
  c.lora.alpha = 16.0  # the product of the factors is scaled by alpha / rank
  c.lora.target = r'trunk/layers/(und|gen)/(q|k|v|o|gate|up|down)_proj/kernel$'  # parameter names
  c.checks = checks()
  c.evaluate = Section()  # held-out captions, scored by the detector of `config.evaluate`
  c.evaluate.every = 10  # iterations; alarms compare the scores with the reward. 0 never
  c.evaluate.prompts = 10  # of every kind
  c.checkpoints = Section()
  c.checkpoints.every = 25  # iterations
  c.checkpoints.keep_best = 1  # count of best checkpoints kept besides the newest two
  # Metric that ranks checkpoints, a mean since the previous one; '': share of correct samples over
  # all tasks
  c.checkpoints.metric = ''
  c.checkpoints.finish = 'last'  # checkpoint that is evaluated and exported: 'last' or 'best'
  return c


def rollout() -> Section:
  """Sampling of groups."""
  c = Section()
  c.group_size = 8  # samples of a prompt
  c.temperature = 1.0  # of sampled texts
  c.steps = 10  # denoising steps of an image
  c.shift = 2.2  # time shift of the grid
  c.sampler = 'sde'  # 'sde' (Flow-GRPO), 'cps' (Flow-CPS) or 'dance' (DanceGRPO)
  c.noise_level = 0.7  # noise level of a step
  c.noise_low = 0.4  # steps that start at a time in (low, high] are noisy
  c.noise_high = 1.0
  # Scale of classifier-free guidance; coupled objectives train the guided policy. 1: none
  c.guidance = 1.0
  # Count of noisy steps replayed in an iteration; coupled objectives train on them. 0: all. (The
  # first half of the steps has times above shift / (1 + shift), a value for noise_low)
  c.window = 2
  # Steps outside the window keep their noise (Flow-GRPO), or not (Flow-GRPO-Fast, MixGRPO)
  c.noise_outside_window = True
  c.window_schedule = 'random'  # or 'sliding' (MixGRPO)
  c.window_every = 25  # iterations between two moves of a sliding window
  return c


def rewards() -> Section:
  """Rewards of every task, under any names; each has a kind, a weight and settings of its kind.

  `kind` is a name in rewards/base.py, or the import path 'module:name' of your own (a class, or a
  function of samples). A weight of 0 leaves a reward out.
  """
  # Count of best patches over which 'dense' averages for a word; 1 is the paper's maximum
  dense = dict(kind='dense', weight=0.0, top=2)
  # `questions`: count of a prompt's questions that are asked about each image in an iteration; the
  # next iteration asks the next ones. With all questions of a prompt (4 in the shapes world),
  # 'mutual' is the whole sum over them, with fewer an estimate of it
  knowledge = dict(kind='knowledge', weight=0.25, questions=1)
  mutual = dict(kind='mutual', weight=0.0, questions=1)
  rules = dict(
    kind='rules',
    weight=1.0,
    # True also rewards parts of a prompt and the format of answers; False: all or nothing
    graded=True,
    detector='components',  # of images: a name in data/detection.py, or an import path
  )
  remote = dict(kind='remote', weight=0.0)  # the judge of `align.remote_judge`
  custom = dict(kind='', weight=0.0)  # for a reward of your own, from the command line
  shared = dict(rules=rules, dense=dense, mutual=mutual, remote=remote, custom=custom)
  semantic = dict(kind='semantic', weight=0.25)
  image = dict(shared, semantic=semantic, knowledge=knowledge)
  answers = dict(shared, semantic=dict(semantic, weight=0.1), knowledge=dict(knowledge, weight=0.1))
  del answers['dense']
  sections = dict(
    generate=image,
    understand=answers,
    edit=dict(image, semantic=dict(semantic, weight=0.0)),
    think_generate=image,
  )
  # A ConfigDict keeps sections that are one object as one: each task has its own.
  return Section({task: copy.deepcopy(section) for task, section in sections.items()})


def remote_judge() -> Section:
  """The remote judge, which computes rewards of the kind 'remote'."""
  c = Section()
  c.url = ''  # such as http://localhost:8000/score
  c.protocol = 'batch'  # or 'chat' (OpenAI-compatible)
  c.model = ''  # sent with chat requests
  # Text of a chat request; '' takes the built-in ones. Its fields are {prompt}, {answer} (sampled),
  # {reference} (right) and {kind}, and {question} and {expected} of a question about the image of a
  # prompt: 'Question: {question} Is the answer {expected}? yes or no'
  c.template = ''
  c.templates = Section(dict.fromkeys(TASKS, ''))  # of single tasks; '' takes template
  c.batch = 8  # samples a request; 'chat' sends one
  c.concurrency = 8  # concurrent requests
  c.retries = 3  # after a connection error, a timeout, 429 or 5xx
  c.timeout_s = 60.0  # seconds of one try
  c.deadline_s = 300.0  # seconds until a sample without a score is invalid
  c.low = 0.0  # smallest score that is valid
  c.high = 1.0  # largest score that is valid
  c.garbage_limit = 3  # consecutive calls for a task that may return no score; 0 permits any
  c.cache = ''  # local file with the scores of one run, for restarts; '.<index>' for each process
  c.api_key_env = ''  # environment variable with the key
  return c


def advantage() -> Section:
  """Computation of advantages from rewards."""
  c = Section()
  # 'normalize_then_sum' (GDPO): rewards are normalised in their group, then summed;
  # 'sum_then_normalize' (the paper). 'gdpo' and 'sum' are other names of the two
  c.method = 'normalize_then_sum'
  # Floor of the divisor, in units of the reward; forms are 'max' (of floor and deviation), 'add'
  # (their sum) and 'root' (of the sum of variance and floor)
  c.floor = 0.05
  c.floor_form = 'max'
  c.scope = 'group'  # deviation of 'group' or 'batch'; 'none': not divided (Dr. GRPO)
  c.ddof = 0  # of the deviation: 0 population, 1 Bessel
  c.clip = 5.0  # bound on the absolute advantage
  return c


def text() -> Section:
  """Objective of texts."""
  c = Section()
  c.objective = 'dapo'  # 'grpo', 'dr_grpo', 'dapo', 'gspo' or 'cispo'
  c.clip_low = 0.2  # clip range of the token ratio
  c.clip_high = 0.28
  c.kl_weight = 0.02  # of the penalty to the reference
  c.kl = 'k3'  # 'k1', 'k2', 'k3', or 'k3_ratio' (weighted by the policy's ratio)
  c.kl_target = 0.0  # where the penalty should be; 0 leaves its weight fixed
  c.kl_adaptation = 0.1  # largest change of an adapting weight an iteration is a fifth of this
  return c


def image() -> Section:
  """Objective of images."""
  c = Section()
  # Decoupled, on freshly noised final images: 'diffusion_nft', 'awm' (advantage-weighted matching).
  # Coupled, on steps of the trajectory: 'flow_grpo' (the Gaussian ratio), 'flow_cps' (without the
  # step's variance), 'grpo_guard', or 'grpo_guard_plain' (not divided by the step's length)
  c.objective = 'diffusion_nft'
  c.clip = 1e-3  # all but 'diffusion_nft': bound on |ratio - 1|; the log-ratio is a mean
  c.draws = 2  # noised copies of every sample for decoupled objectives
  c.nft_beta = 1.0  # mixture of policy and old policy
  c.nft_advantage_scale = 2.0  # advantage at which the optimality probability saturates
  c.old_policy_flat = 0  # iterations in which the old policy is a plain copy
  c.old_policy_rise = 0.02  # rise of its decay per iteration after them
  c.old_policy_max_decay = 0.5  # largest decay
  c.kl_weight = 0.02  # of the penalty to the reference
  # 'velocity' (mean squared difference); coupled objectives also 'gaussian' (the exact KL of a
  # step), or 'gaussian_per_time' (without the step's length, as Flow-GRPO's code)
  c.kl = 'velocity'
  c.kl_target = 0.0  # where the penalty should be; 0 leaves its weight fixed
  c.kl_adaptation = 0.1  # largest change of an adapting weight an iteration is a fifth of this
  return c


def checks() -> Section:
  """Checks during alignment, some of which end a run."""
  c = Section()
  # Largest |log-ratio| between rollout and replay before an update; a larger one ends the run. 0
  # permits any; -1 takes the limit of `rollouts/mismatch.py` for the compute dtype
  c.mismatch = Section()
  c.mismatch.text_max = -1.0  # of a token, as teacher forcing scores it
  c.mismatch.text_mean = -1.0  # mean over tokens, as teacher forcing scores them
  c.mismatch.decode_max = -1.0  # of a token, between decoding and teacher forcing
  c.mismatch.image_max = -1.0  # of a step, a mean over latents; keep it well below image.clip
  # Iterations between two measurements of gradients by task and of the share of gradients below the
  # optimizer's eps, which copy the state; 0 never
  c.gradients_every = 10
  c.stop_on_alarm = False  # ends the alignment at the first alarm
  return c


def evaluate() -> Section:
  """Scores on held-out prompts, before and after alignment."""
  c = Section()
  c.detector = (
    'rendering'  # other than the reward's: a name in data/detection.py, or an import path
  )
  # Prompts of every kind; think_generate uses the captions of generate, with a plan first
  c.prompts = Section(dict(generate=60, unseen=60, understand=60, edit=60, think_generate=0))
  c.samples = 4  # images and sampled answers of a prompt
  c.steps = 10  # Euler steps
  c.shift = 2.2  # time shift of the grid
  c.guidance = 1.0  # scale of classifier-free guidance; 1: none
  c.batch = 60  # prompts at once
  c.guided_prompts = 20  # prompts of every kind for the guided baseline; 0 leaves it out
  c.guided_scales = (2.0, 3.0)  # scales tried for the guided baseline
  return c


def sample() -> Section:
  """The program 'sample': one answer or image."""
  c = Section()
  c.task = 'generate'  # 'generate', 'understand' or 'edit'
  c.prompt = ''
  c.image = ''  # file of the image to ask about or to edit
  c.think = False  # samples a plan first
  # Text before everything else, used with `think`
  c.system = Section(dict(generate='', understand='', edit=''))
  c.size = (0, 0)  # pixels (width, height) of a new image; 0 is the model's own
  c.steps = 49  # Euler steps
  c.shift = 2.2  # time shift of the grid
  # Scales of 1 turn a branch off; guidance is on at times in (low, high]
  c.guidance = Section()
  for task in ('generate', 'edit'):
    c.guidance[task] = Section(
      dict(text_scale=1.0, image_scale=1.0, low=0.4, high=1.0, renorm='global', renorm_min=0.0)
    )
  c.max_tokens = 512  # of an answer or a plan
  c.temperature = 0.0  # 0 takes the most likely token
  c.top_p = 1.0  # probability mass of the tokens that are sampled from
  c.buckets = True  # a few image sizes and text lengths, so that little compiles
  return c


def convert() -> Section:
  """The program 'convert': imports released folders into workdirs, and exports them."""
  c = Section()
  c.direction = 'import'  # 'import': a released folder into the workdir; 'export': the reverse
  c.target = ''  # new folder to export to
  c.shards = 1  # files of the exported model
  return c


def compile_ahead() -> Section:
  """The programs 'compile' and 'describe', for devices that need not be present."""
  c = Section()
  c.topology = ''  # such as 'v5p:4x4x4'
  c.image_size = 0  # pixels a side; 0 is that of the data
  c.programs = ('text', 'image', 'step')
  return c


def study() -> Section:
  """The program 'study': many runs that start from the same pretrained models."""
  c = Section()
  c.name = 'full'  # name of one of `plans`
  c.workers = 1  # concurrent runs, each on its share of the CPU's cores
  c.plans = Section()  # name: seeds, variants and changes to this config
  c.variants = Section()  # name: changes to this config; one run for each
  c.critic = Section()  # a dual encoder that bounds mutual information; it gives no reward
  c.critic.seed = 1000  # of its own data, initialisation and batches
  c.critic.changes = Section(dict(dual_encoder=dict(steps=600)))  # to this config
  c.critic.pairs = 512  # true pairs that set the scale of its logits
  return c


def parallel() -> Section:
  """Distribution of work over devices."""
  c = Section()
  # Devices along data, fsdp, tensor. One may be -1 and takes the remaining devices; 0 takes as many
  # as divide 32 (fsdp) or 4 (tensor), of one slice if there are several
  c.mesh = (-1, 1, 1)
  # Slices of TPUs or hosts of GPUs, along the same axes; they divide the mesh
  c.slices = (-1, 1, 1)
  # Mesh of rollouts over the same devices, with weights in the compute dtype; () is `mesh`. Without
  # fsdp, rollouts gather no weights
  c.rollout_mesh = ()
  # One pass over the layers for contexts and the tokens after them; weights are gathered once
  c.joint = False
  c.runner = 'jit'  # 'jit' over the mesh, or 'pmap' (data parallel)
  c.micro_batches = 1  # parts of a batch, whose gradients are accumulated
  # Parts into which the samples of every prompt are split as well; each part encodes the context
  # anew. 0: one part, or one a sample if memory is short (TPUs of at most 32 GB, or fsdp below 32)
  c.group_parts = 1
  return c
