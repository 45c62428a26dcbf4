"""The default job: a small unified model on the shapes world, pretrained and aligned.

    python -m lvrpo_jax.main --config=configs/base.py

Two CPU cores, no accelerator. Every key of the project is here, once, with its unit and meaning.
Other configs import this one and assign.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
  """Returns the default configuration."""
  config = config_dict.ConfigDict()
  # 'run': all stages; 'pretrain': those before alignment; 'control': more pretraining instead of
  # alignment; 'study': many such runs, see configs/study.py; 'sample': one answer or picture;
  # 'convert': a released model in, an aligned one out; 'describe': how parameters are laid out on
  # the mesh; 'compile': the programs of alignment for TPUs that need not be there
  config.program = 'run'
  config.seed = 0  # of initialisation, data, rollouts and noise
  config.checkpoint = ''  # folder of a released model; '' trains the small one of config.model
  # The released model's sizes in its own format, see configs/bagel_7b.py; empty: the folder's.
  config.architecture = config_dict.ConfigDict()

  config.data = config_dict.ConfigDict()
  config.data.source = 'lvrpo_jax.data.shapes.source:ShapesData'  # import path of the data class
  config.data.prompt_words = 14  # tokens of the longest caption, question or instruction
  config.data.answer_words = 14  # tokens of the longest answer, reasoning included
  config.data.uniform = True  # one row shape for all tasks: one pass, less to compile
  config.data.wrong = 0.1  # fraction of wrong answers without a plan in pretraining, as on the web
  config.data.chatty = 0.1  # fraction of answers without a plan that keep no format
  config.data.plan = 0.7  # fraction of answers that reason first, where one word is not enough
  config.data.describe = 0.3  # fraction of pretraining questions that ask for the whole image
  config.data.drop = 0.1  # probability of leaving the text out, which trains guidance
  config.data.generate_kinds = config_dict.ConfigDict(
    dict(  # relative frequency in training
      single_object=2.0, two_object=3.0, counting=3.0, colors=2.0, position=7.0, color_attr=3.0
    )
  )
  config.data.question_kinds = config_dict.ConfigDict(
    dict(  # relative frequency in training
      color=1.0, shape=1.0, count=3.0, relation=6.0, compare=3.0, reason=3.0
    )
  )
  config.data.prefetch = 4  # batches made ahead in the background

  config.model = config_dict.ConfigDict()
  config.model.width = 96  # residual stream of both experts
  config.model.depth = 4  # layers
  config.model.heads = 2  # query heads; width / heads is the head width and must be even
  config.model.kv_heads = 1  # key/value heads; must divide heads
  config.model.ff_width = 256  # feed-forward width of each expert
  config.model.rope_theta = 1e4  # base of the rotary positions
  config.model.position_side = 16  # of the position tables; images are stretched over them
  config.model.eps = 1e-6  # of the norms
  config.model.dtype = 'float32'  # compute dtype; parameters are float32
  config.model.unroll = 4  # layers unrolled per scan step; depth is fastest on CPU, 1 elsewhere
  config.model.remat = 'none'  # 'none', 'full', or a name in jax.checkpoint_policies
  # 'xla' (any mask), 'splash' (Pallas, TPU), 'cudnn' (GPU, 16 bits), or 'auto' by backend
  config.model.attention = 'auto'
  config.model.vit_width = 96  # vision tower
  config.model.vit_depth = 1
  config.model.vit_heads = 4
  config.model.vit_ff_width = 256
  config.model.vit_patch = 16  # pixels a side

  config.vae = config_dict.ConfigDict()
  config.vae.patch = 16  # pixels a side of one latent token
  config.vae.channels = 40  # values of a latent token
  config.vae.whiten = 0.5  # 1: latents of unit deviation; 0: principal components as they are
  config.vae.images = 3000  # training images that the autoencoder is fitted to

  config.judge = config_dict.ConfigDict()  # the SigLIP dual encoder of the semantic reward
  config.judge.width = 96  # of both towers and the joint space
  config.judge.depth = 1  # layers of each tower
  config.judge.heads = 4
  config.judge.ff_width = 256
  config.judge.patch = 16  # pixels a side
  config.judge.steps = 300  # training steps
  config.judge.batch = 64  # image-text pairs a step
  config.judge.learning_rate = 2e-3

  config.pretrain = config_dict.ConfigDict()
  config.pretrain.steps = 800
  config.pretrain.generate = 48  # captions a step; 0 leaves the task out
  config.pretrain.understand = 48  # questions a step
  config.pretrain.edit = 24  # edits a step
  config.pretrain.think_generate = 0  # captions with a plan before the image
  config.pretrain.draws = 2  # noised copies of every image; they share one encoded context
  config.pretrain.weights = config_dict.ConfigDict(
    dict(  # of the task losses
      generate=1.0, understand=1.0, edit=1.0, think_generate=1.0
    )
  )
  config.pretrain.shift = 2.2  # time shift of the logit-normal training times
  config.pretrain.ema = 0.0  # decay of the running mean of parameters; 0 keeps none
  config.pretrain.save_every = 200  # steps

  config.control = config_dict.ConfigDict()  # continued pretraining, see configs/base_control.py
  config.control.steps = 600
  config.control.rate = 0.5  # factor of the pretraining learning rates
  config.control.repa = 0.0  # weight of representation alignment (REPA uses 0.5); 0 leaves it out
  config.control.repa_layer = 2  # layers after which states are aligned

  config.optimizer = config_dict.ConfigDict()  # of pretraining
  config.optimizer.kind = 'muon'  # 'adamw', or 'muon' for the kernels of the trunk's layers
  config.optimizer.muon_rate = 2e-2  # learning rate of those kernels
  config.optimizer.learning_rate = 2e-3  # of AdamW
  config.optimizer.schedule = 'linear'  # 'linear': flat, then to 0 from half time; or 'constant'
  config.optimizer.warmup = 20  # steps
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.98
  config.optimizer.eps = 1e-8
  config.optimizer.weight_decay = 0.01  # on kernels
  config.optimizer.clip_norm = 1.0  # of the global gradient norm

  config.sampling = config_dict.ConfigDict()  # of evaluation
  config.sampling.steps = 10  # Euler steps
  config.sampling.shift = 2.2  # time shift of the grid
  config.sampling.guidance = (2.0, 3.0)  # scales tried for the guided baseline

  config.align = config_dict.ConfigDict()
  config.align.steps = 70  # iterations: rollout, reward, advantage, updates
  config.align.group = 8  # samples of a prompt
  config.align.generate = 16  # prompts an iteration; 0 leaves the task out
  config.align.understand = 32
  config.align.edit = 8
  # A text plan and the image after it, one trajectory with one reward; see configs/think.py
  config.align.think_generate = 0
  config.align.weights = config_dict.ConfigDict(
    dict(  # of the task losses
      generate=1.0, understand=1.0, edit=1.0, think_generate=1.0
    )
  )
  # Further rounds of fresh prompts that replace those whose samples are all worth the same (DAPO)
  config.align.refill = 0
  config.align.refill_by = 'rules'  # the component that has to vary; '': any
  config.align.updates = 2  # optimizer steps on every rollout
  config.align.rewards = config_dict.ConfigDict()  # component: weight; 0 leaves it out
  config.align.rewards.generate = config_dict.ConfigDict(
    dict(rules=1.0, semantic=0.25, dense=0.0, knowledge=0.25, mutual=0.0, remote=0.0)
  )
  config.align.rewards.understand = config_dict.ConfigDict(
    dict(rules=1.0, semantic=0.1, knowledge=0.1, mutual=0.0, remote=0.0)
  )
  config.align.rewards.edit = config_dict.ConfigDict(
    dict(rules=1.0, semantic=0.0, dense=0.0, knowledge=0.25, mutual=0.0, remote=0.0)
  )
  config.align.rewards.think_generate = config_dict.ConfigDict(
    dict(rules=1.0, semantic=0.25, dense=0.0, knowledge=0.25, mutual=0.0, remote=0.0)
  )
  # Whether the rules pay parts of what was asked, and the format of answers; or all or nothing
  config.align.graded = True
  # Questions of a prompt that are asked about each of its images in an iteration, the next ones in
  # the next: 'knowledge' is the mean over them. At as many as a prompt has (4 in the shapes world)
  # 'mutual' is their whole sum, at fewer an estimate of it
  config.align.questions = 1
  config.align.remote = config_dict.ConfigDict(
    dict(  # the judge of the component 'remote'
      url='',  # such as http://localhost:8000/score
      protocol='batch',  # or 'chat' (OpenAI-compatible)
      model='',  # sent with chat requests
      # Text of a chat request; '' takes the built-in ones. It may name {prompt}, {answer} (given),
      # {reference} (right) and {kind}, and {question} and {expected} of a question that the prompt
      # implies about its image: 'Question: {question} Is the answer {expected}? yes or no'
      template='',
      templates=dict(  # of single tasks; '' takes template
        generate='', understand='', edit='', think_generate=''
      ),
      batch=8,  # samples a request; 'chat' sends one
      concurrency=8,  # requests under way at once
      retries=3,  # after a connection error, a timeout, 429 or 5xx
      timeout_s=60.0,  # seconds of one try
      deadline_s=300.0,  # seconds until a sample without a score is invalid
      low=0.0,
      high=1.0,  # smallest and largest score that is valid
      garbage_limit=3,  # calls in a row for a task that may be answered without a score; 0 any
      cache='',  # local file that keeps scores over restarts; of one run, with .<number> a process
      api_key_env='',
    )
  )  # environment variable with the key
  config.align.detector = (
    'lvrpo_jax.data.shapes.detect_moments:detect_components'  # import path; of 'rules'
  )
  config.align.custom = config_dict.ConfigDict(
    dict(  # your reward, 'module:function', and weight
      generate='',
      generate_weight=1.0,
      understand='',
      understand_weight=1.0,
      edit='',
      edit_weight=1.0,
      think_generate='',
      think_generate_weight=1.0,
    )
  )
  # Best patches over which 'dense' takes the mean for a word; 1 is the paper's maximum
  config.align.dense_top = 2
  config.align.advantage = 'gdpo'  # 'gdpo': normalise each component; 'sum': the paper's form
  config.align.floor = 0.05  # smallest deviation divided by, in units of the reward;
  # it enters as 'max' (of it and the deviation), 'add' (to it) or 'root' (of variance and floor)
  config.align.floor_form = 'max'
  config.align.scope = 'group'  # deviation of 'group' or 'batch'; 'none': not divided (Dr. GRPO)
  config.align.ddof = 0  # of the deviation: 0 population, 1 Bessel
  # Images: 'nft' (DiffusionNFT), 'awm' (advantage-weighted matching); on replayed steps 'sde' (the
  # Gaussian ratio: Flow-GRPO, or DanceGRPO with its sampler), 'cps' (Flow-CPS, without the step's
  # variance), 'guard' (GRPO-Guard) or 'guard_plain' (not divided by the step's length)
  config.align.objective = 'nft'
  config.align.steps_per_image = 10  # denoising steps of a rollout
  config.align.sampler = 'sde'  # 'sde' (Flow-GRPO), 'cps' or 'dance'
  config.align.eta = 0.7  # noise scale of the sampler
  # Scale of classifier-free guidance while sampling; objectives on replayed steps train the guided
  # policy. 1: none
  config.align.guidance = 1.0
  config.align.noise_low = 0.4  # steps that start at a time in (low, high] are noisy
  config.align.noise_high = 1.0
  # Noisy steps replayed an iteration; 'sde' and 'guard' train on them. 0: all. (The first half of
  # the steps has times above shift / (1 + shift), a value for noise_low.)
  config.align.window = 2
  # Noisy steps outside the window: noisy as well (Flow-GRPO), or not (Flow-GRPO-Fast, MixGRPO)
  config.align.noise_outside = True
  config.align.window_schedule = 'random'  # or 'sliding' (MixGRPO)
  config.align.window_every = 25  # iterations between two moves of a sliding window
  config.align.draws = 2  # noised copies of every sample for 'nft' and 'awm'
  config.align.nft_beta = 1.0  # mixture of policy and old policy
  config.align.nft_scale = 2.0  # advantage at which the optimality probability saturates
  config.align.old_flat = 0  # old policy: iterations of plain copies,
  config.align.old_rise = 0.02  # rise of its decay an iteration,
  config.align.old_hold = 0.5  # and its largest decay
  config.align.image_clip = 1e-3  # all but 'nft': bound on |ratio - 1|; the log-ratio is a mean
  config.align.velocity_penalty = 0.02  # weight of the images' penalty to the reference:
  # 'velocity' (mean squared difference); with 'sde' and 'guard' also 'gaussian' (the exact KL of a
  # step), or 'gaussian_per_time' (without the step's length, as Flow-GRPO's code)
  config.align.image_kl = 'velocity'
  config.align.image_target = 0.0  # where the images' penalty should be; 0 leaves its weight fixed
  config.align.temperature = 1.0  # of sampled answers
  config.align.text_low = 0.2  # clip range of the token ratio
  config.align.text_high = 0.28
  config.align.text_objective = 'dapo'  # 'grpo', 'dr_grpo', 'dapo', 'gspo' or 'cispo'
  config.align.text_penalty = 0.02  # weight of the answers' penalty to the reference:
  config.align.text_kl = 'k3'  # 'k1', 'k2', 'k3', or 'k3_ratio' (weighted by the policy's ratio)
  config.align.text_target = 0.0  # where the answers' penalty should be; 0 leaves its weight fixed
  config.align.adapt = 0.1  # largest change of an adapting weight an iteration is a fifth of this
  config.align.lora = config_dict.ConfigDict(
    dict(  # adapters instead of all parameters
      rank=0,  # 0 trains all parameters
      alpha=16.0,  # the product of the factors is scaled by alpha / rank
      target=r'trunk/layers/(und|gen)/(q|k|v|o|gate|up|down)_proj/kernel$',
    )
  )  # parameter names
  # Largest |log-ratio| between rollout and replay before an update; more ends the run. 0: any
  config.align.gap_limit = config_dict.ConfigDict(
    dict(
      texts=1e-5,  # of a token, as teacher forcing scores it
      texts_mean=1e-5,  # the same, the mean over tokens
      decode=1e-3,  # of a token, between decoding and teacher forcing
      images=1e-5,
    )
  )  # of a step, a mean over latents; well below image_clip
  config.align.learning_rate = 3e-4
  config.align.understand_rate = 0.3  # multiplier of the rate for the understanding expert
  config.align.clip_norm = 1.0
  # Iterations between gradients by task, for which the state is copied; 0 never
  config.align.diagnose_every = 10
  # Iterations between scores on held-out captions by the detector that reports, so many of every
  # kind; alarms compare them with the reward. 0 never
  config.align.gold_every = 10
  config.align.gold = 10
  config.align.stop_on_alarm = False  # ends the alignment at the first alarm
  config.align.save_every = 25  # iterations
  config.align.keep_best = 1  # checkpoints of the best score, kept besides the newest two
  # Metric that ranks checkpoints, its mean since the one before; '': what is correct, all tasks
  config.align.score = ''
  config.align.finish = 'last'  # the policy that is measured and exported, or 'best'

  config.evaluate = config_dict.ConfigDict()
  config.evaluate.detector = (
    'lvrpo_jax.data.shapes.detect_rendering:detect_by_rendering'  # not the reward's
  )
  config.evaluate.generate = 60  # prompts of every kind
  config.evaluate.unseen = 60
  config.evaluate.understand = 60
  config.evaluate.edit = 60
  config.evaluate.think_generate = 0  # prompts as those of generate, with a plan first
  config.evaluate.images = 4  # images and sampled answers of a prompt
  config.evaluate.guidance = 1.0  # scale of classifier-free guidance of the pictures; 1: none
  config.evaluate.batch = 60  # prompts at once
  config.evaluate.guided = 20  # prompts of every kind for the guided baseline; 0 leaves it out

  config.study = 'full'  # of the program 'study': which of config.studies
  config.workers = 1  # runs of a study at once, each on its share of the CPU's cores
  config.studies = config_dict.ConfigDict()  # name: seeds, variants and changes to this config
  config.variants = config_dict.ConfigDict()  # name: changes to this config; a run each
  config.critic = config_dict.ConfigDict()  # bounds what texts say about pictures; no reward
  config.critic.seed = 1000  # of its own world, start and batches
  config.critic.changes = config_dict.ConfigDict(
    dict(  # to this config
      judge=dict(steps=600)
    )
  )
  config.critic.pairs = 512  # true pairs that set the scale of its logits

  config.sample = config_dict.ConfigDict()  # of the program 'sample'
  config.sample.task = 'generate'  # 'generate', 'understand' or 'edit'
  config.sample.prompt = ''
  config.sample.image = ''  # file of the image to ask about or to edit
  config.sample.think = False  # writes a thought first
  config.sample.system = config_dict.ConfigDict(
    dict(  # text before all else, where it thinks
      generate='', understand='', edit=''
    )
  )
  config.sample.size = (0, 0)  # pixels (width, height) of a new image; 0 is the model's own
  config.sample.points = 50  # of the time grid; the steps are one fewer
  config.sample.shift = 2.2  # time shift of the grid
  config.sample.guidance = config_dict.ConfigDict(
    {  # scales of 1 turn a branch off
      task: dict(
        text_scale=1.0, image_scale=1.0, low=0.4, high=1.0, renorm='global', renorm_min=0.0
      )
      for task in ('generate', 'edit')
    }
  )
  config.sample.max_tokens = 512  # of an answer or a thought
  config.sample.temperature = 0.0  # 0 takes the most likely token
  config.sample.top_p = 1.0  # probability mass of the tokens drawn from
  config.sample.buckets = True  # a few image sizes and text lengths, so that little compiles

  config.convert = config_dict.ConfigDict()  # of the program 'convert'
  config.convert.direction = 'import'  # a released folder into the workdir, or 'export'
  config.convert.target = ''  # new folder to export to
  config.convert.shards = 1  # files of the exported model

  config.topology = ''  # of the programs 'compile' and 'describe', e.g. 'v5p:4x4x4'
  config.compile = config_dict.ConfigDict()  # of the program 'compile'
  config.compile.image_size = 0  # pixels a side; 0 is that of the data
  config.compile.programs = ('text', 'image', 'step')

  config.parallel = config_dict.ConfigDict()
  # Devices along data, fsdp, tensor. One may be -1 and takes what is left; 0 takes as many as
  # divide 32 (fsdp) or 4 (tensor), of one slice where there are several
  config.parallel.mesh = (-1, 1, 1)
  # Slices of TPUs or hosts of GPUs, along the same axes; they divide the mesh
  config.parallel.slices = (-1, 1, 1)
  # Rollouts' view of the same devices, weights in the compute dtype; () is the mesh itself. Without
  # fsdp no step of a rollout gathers weights.
  config.parallel.rollout_mesh = ()
  # Contexts and what follows them in one pass over the layers: weights are gathered once
  config.parallel.joint = False
  config.parallel.runner = 'jit'  # 'jit' over the mesh, or 'pmap' (data parallel)
  config.parallel.micro_batches = 1  # parts a batch is split into, gradients accumulated
  # Parts the samples of every prompt are split into as well, each with the context anew; 0: one, or
  # every sample by itself where memory is short: on TPUs of at most 32 GB, or with fsdp below 32
  config.parallel.group_parts = 1

  config.log_every = 10  # seconds between log lines where there is no terminal
  config.report = True  # write report.html at the end
  return config
