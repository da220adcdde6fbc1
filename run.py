"""Train, evaluate and report: `python run.py --env cartpole --algo directed-fomaml --seed 1`; all flags: `--help`.

Runs of one algorithm, seeds × step sizes, are one batched program along the first axis S; several processes share them
out. Read `main` first, then `train` and `train_epoch`, which is Algorithm 1; Eq. 2b is in maml.py, the δ-step in
directed.py.
"""

import contextlib
import os
import sys
import time
from functools import partial

from harness import program  # before numpy and torch

if __name__ == "__main__":
    program.prepare()

import numpy
import torch

import envs
import maml
import policies
from directed import directed
from envs import EVALUATION, MEDIUM, TASKS
from harness import checkpoints, processes, report, watch
from harness.checkpoints import RunError
from harness.console import Progress, one_clear_line
from harness.device import Recorded, choose_device
from harness.errors import End, first_line
from harness.gyms import info_names
from harness.log import Rows, fail, fetched, info_means, log_epoch, log_evaluation, measure
from harness.optimizers import OPTIMIZERS
from harness.plan import check_memory, folder_of_all, make_env, with_family_defaults
from harness.ranks import check_ranks
from harness.sampling import open_sampler
from harness.settings import learner_of, parse
from harness.start import begin, new_runs
from harness.text import quoted

NOTHING = contextlib.nullcontext()
CHECKPOINT_SECONDS = 20  # the most training time that a crash can cost


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    with one_clear_line(argv) as ranks:
        args = parse(argv)
        if args.watch is not None:
            return print(watch.watch(args.watch, args.phi, args.env))
        if args.report is not None:
            return report.rewrite(args.report, args.window)
        check_ranks(args, ranks)
        torch.set_num_threads(1)  # until training: a process forked from one that has used several threads hangs
        env = make_env(args)
        args = with_family_defaults(args, env)
        check_memory(args, env, choose_device(args.device, env))
        runs = new_runs(args, env)
        failures, stopped = train_all(runs, env, args, ranks)
        ranks.object_from_first(lambda: finish(failures, args))
        if stopped:
            words = [word for word in argv if word not in ("--resume", "--overwrite")]
            start = "python" if ranks.count == 1 else "torchrun .."
            line = " ".join(map(quoted, [os.path.relpath(__file__), *words, "--resume"]))
            ranks.leave()
            raise RunError(f"stopped; continue with: {start} {line}", 128 + stopped[0])
        if failures:
            raise End(1)


# --- train ---


def train_all(runs, env, args, ranks):
    """Train all runs, in several processes where there are as many runs and cores, each with a share of the runs.

    Returns a line for each run that failed, and the signals that stopped the training, if any.
    """
    device = choose_device(args.device, env)
    processes.keep_memory()
    with (
        checkpoints.opened(runs, args.resume, args.overwrite, args.epochs) if ranks.rank == 0 else NOTHING,
        processes.caught_signals() as signals,
        Progress(runs, args, ranks) as progress,
    ):
        states = ranks.object_from_first(lambda: [run.state for run in runs])
        for run, state in zip(runs, states, strict=True):
            run.state = state
        workers = min(args.workers, processes.most_processes())
        trainers = 1 if device == "cuda" or ranks.count > 1 else max(min(workers, len(runs)), 1)
        trajectories = runs[0].settings["tasks"] * runs[0].settings["trajectories"]
        samplers = min(workers // trainers, trajectories)  # for each trainer, if gymnasium's environments
        work = partial(train_together, args=args, env=env, device=device, samplers=samplers, ranks=ranks)
        failures = processes.run_jobs(work, processes.share_out(runs, trainers), trainers, progress.update, signals)
    return failures, signals


def train_together(runs, tell, args, env, device, samplers, ranks):
    """Train runs as one batch to the command's epochs. Returns a line for each run that failed.

    tell: a function of what there is to say of an epoch; returns the signals that ask to stop after it.
    """
    torch.set_num_threads(args.threads)
    head = policies.make_head(env.actions)
    for run in runs if ranks.rank == 0 else ():
        begin(run, args, env, device, len(runs))
    with (
        open_sampler(env, head, device, samplers if samplers > 1 else 0) as sample,
        Rows(writes=ranks.rank == 0) as rows,
    ):
        return train(Batch(runs, env, head, sample, device, ranks, rows), args.epochs, args.eval_every, tell)


def train(batch, epochs, eval_every, tell):
    """Train a batch to `epochs`, evaluating and saving it on the way; see `train_together`."""
    failures, stopping, saved = [], [], time.perf_counter()
    epoch = Recorded(train_epoch)
    while batch and batch.epochs_done < epochs and not stopping:
        start = time.perf_counter()
        batch.set_schedules()
        measured = fetched(epoch(batch))
        finite = log_epoch(batch, measured, time.perf_counter() - start)
        stopping = batch.ranks.any(tell(batch.news()))
        if not all(finite):
            batch.rows.append()
            failures += [fail(batch, run) for run, good in zip(batch.runs, finite, strict=True) if not good]
            batch = batch.only(finite)
        if batch and (batch.epochs_done % eval_every == 0 or batch.epochs_done == epochs):
            evaluate(batch)
        due = time.perf_counter() - saved > CHECKPOINT_SECONDS
        if batch and (stopping or batch.epochs_done == epochs or due):
            batch.save()
            saved = time.perf_counter()
    return failures


def train_epoch(batch):
    """One epoch of Algorithm 1, for all runs of the batch at once. Returns what `measure` finds.

    It changes tensors in place and asks nothing of the host, so that it can be recorded as a CUDA graph.
    """
    num_tasks, medium = batch.settings["tasks"], batch.settings["medium"]
    phi = envs.sample_tasks(batch.env, batch.stream(TASKS), num_tasks)  # line 6: φ ~ ρ, (S, M, P)
    task_loss = (ReplayedLoss if batch.settings["outer_steps"] > 1 else TaskLoss)(batch, TASKS, phi, batch.ranks.tasks)
    losses, medium_loss = [task_loss], None
    if medium is not None:
        phi_med = envs.medium_task(batch.env, medium, phi, batch.stream(MEDIUM))  # line 1: (S, 1, P)
        medium_loss = TaskLoss(batch, MEDIUM, phi_med, pooled=medium == "pooled")
        losses = [medium_loss, task_loss]
    before = batch.position()
    # lines 4, 5: the δ-step, directed.py; 7 to 11: the inner steps and the meta-gradient, maml.py
    adapted = batch.meta_learner(batch.theta, *losses, batch.alpha, num_tasks, **batch.learner_options)
    between = batch.position()  # after the δ-step alone
    batch.optimizer.step()  # line 12: the β-step
    for _ in range(1, batch.settings["outer_steps"]):  # ProMP: more of them on the same trajectories
        # without the δ-step: it is a plain step, whose data are those of θ before it, and no ratio holds it back
        task_loss.replay()
        batch.undirected(batch.theta, task_loss, batch.alpha, num_tasks, **batch.learner_options)
        batch.optimizer.step()
    if adapted is not None:
        # Reptile trains on no batch under θ', so its return there, as the other learners log it, takes trajectories of
        # its own. They are no training, so env steps do not count them.
        task_loss.draw(adapted)
    batch.epoch += 1
    return measure(batch, medium_loss, task_loss, between - before, batch.position() - between)


class TaskLoss:
    """task_loss(params) -> (S, M): K fresh trajectories of each task φ (S, M, P) under params, and the loss on them.
    pooled: (S, 1), K trajectories in all, K / M of each, as one task whose φ differs from episode to episode.

    Of the M tasks it takes its `own` alone, with the noise that they have in any company. Keeps the mean undiscounted
    return (S, M) and `info_means` of every call, sums up env steps (S,); finite: every loss of a run was (S,).
    """

    def __init__(self, batch, purpose, phi, own=slice(None), pooled=False):
        self.env, self.sample, self.stream = batch.env, batch.sample, batch.stream(purpose)
        self.phi, self.tasks = phi[:, own], range(phi.shape[1])[own]
        self.pooled, self.num_trajectories = pooled, batch.settings["trajectories"]
        if pooled:
            self.num_trajectories //= len(self.tasks)
        options = {key: batch.settings[key] for key in policies.OPTIONS}
        self.loss = partial(policies.loss, head=batch.head, **options)
        self.returns, self.info, self.env_steps, self.finite = [], [], 0, True

    def __call__(self, params):
        trajectories = self.draw(params)
        self.env_steps = self.env_steps + trajectories["mask"].sum((1, 2, 3))
        return self.loss_on(trajectories, params)

    def draw(self, params):
        """Fresh trajectories, whose returns are kept; their env steps are for the caller to count."""
        call = len(self.returns) + 1
        noise = envs.draw_noise(self.env, self.stream, self.tasks, self.num_trajectories, call)
        policy = maml.expand(params, len(self.tasks)) if self.pooled else params
        trajectories = self.sample(policy, self.phi, noise)
        if self.pooled:
            trajectories = {key: x.flatten(1, 2).unsqueeze(1) for key, x in trajectories.items()}  # (S, 1, K, ...)
        self.returns.append(trajectories["rewards"].sum(3).mean(2))
        self.info.append(info_means(trajectories))
        return trajectories

    def kl(self, theta):
        """Of trajectories that are used once there is none to log."""
        return None

    def loss_on(self, trajectories, params, **options):
        loss = self.loss(params, trajectories, **options)
        self.finite = self.finite & loss.detach().isfinite().all(1)
        return loss


class ReplayedLoss(TaskLoss):
    """A TaskLoss that keeps what it draws. After `replay` the n-th call gets the loss on what the n-th call drew, by
    likelihood ratios, clipped in query batches alone: inner steps are those of `maml.adapt`, whatever the ratio."""

    def __init__(self, batch, purpose, phi, own):
        super().__init__(batch, purpose, phi, own)
        options = {key: batch.settings[key] for key in policies.OPTIONS if key != "estimator"}
        self.as_drawn = partial(policies.as_drawn, head=batch.head, **options)
        self.head, self.clip, self.period = batch.head, batch.settings["clip"], batch.draws_per_gradient
        self.drawn, self.replays = [], None

    def replay(self):
        """Begin an outer step on what was drawn in the first."""
        self.replays = iter(enumerate(self.drawn, 1))

    def __call__(self, params):
        if self.replays is None:
            return super().__call__(params)
        call, trajectories = next(self.replays)
        return self.loss_on(trajectories, params, clip=self.clip if call % self.period == 0 else None)

    def loss_on(self, trajectories, params, **options):
        if self.replays is None:
            self.drawn.append(self.as_drawn(params, trajectories))
        return super().loss_on(trajectories, params, **options)

    def kl(self, theta):
        """KL(π_old ‖ π_θ) of the policy before adaptation: (S, M)."""
        before, *_ = self.drawn
        return policies.kl(maml.expand(theta, before["mask"].shape[1]), before, self.head)


def penalised(meta_learner, eta, ranks):
    """Add η Σᵢ ∇KL(π_old ‖ π_θ), of the policy before adaptation, to the meta-gradient of replayed trajectories
    (Rothfuss et al. 2019). When they are drawn it is 0."""

    def penalised_meta_learner(theta, task_loss, *args, **kwargs):
        returned = meta_learner(theta, task_loss, *args, **kwargs)
        if task_loss.replays is not None:
            penalty = eta * task_loss.kl(theta).sum()
            gradients = torch.autograd.grad(penalty, list(theta.values()), materialize_grads=True)  # 0 of the critic
            ranks.sum(gradients)
            for p, gradient in zip(theta.values(), gradients, strict=True):
                p.grad += gradient
        return returned

    return penalised_meta_learner


def evaluate(batch):
    """Returns on the held-out grid (G, P) after 0, 1, .. eval_steps inner steps, and what the environment says of the
    episodes (`info_means`), as rows of every run's eval.csv."""
    num_steps, ranks = batch.settings["eval_steps"], batch.ranks
    grid = envs.held_out_tasks(batch.env, batch.settings["eval_range"], batch.settings["eval_values"])
    phi = batch.sample.placed(grid.expand(len(batch.runs), *grid.shape))
    task_loss = TaskLoss(batch, EVALUATION, phi, ranks.tasks)
    columns = 1 + len(info_names(batch.env))
    outcomes = torch.zeros(len(batch.runs), len(grid), num_steps + 1, columns, dtype=torch.float64)
    own = outcomes[:, ranks.tasks]  # a view: (S, this rank's share of G, steps + 1, return and info)
    if own.numel():
        theta = maml.expand(batch.theta, own.shape[1])
        objective = task_loss
        if batch.learner.proximal:  # steps of another α are pulled back to θ by the same share of the way: α λ
            lambda_ = batch.learner_options["lambda_"] * batch.alpha / batch.eval_alpha
            objective = maml.proximal(task_loss, theta, lambda_)
        adapted = maml.adapt(theta, objective, batch.eval_alpha, num_steps, second_order=False)
        task_loss({name: p.detach() for name, p in adapted.items()})  # the returns after the last step
        own[..., 0].copy_(torch.stack(task_loss.returns, 2))
        own[..., 1:].copy_(torch.stack(task_loss.info, 2))
    ranks.sum([outcomes])
    log_evaluation(batch, grid, outcomes)


# --- a batch of runs ---


class Batch:
    """S runs of one algorithm at the same epoch, trained as one program. Leaves of theta and alpha are (S, 1, ...)."""

    def __init__(self, runs, env, head, sample, device, ranks, rows):
        self.runs, self.settings, self.rows = runs, runs[0].settings, rows
        self.env, self.head, self.sample, self.device, self.ranks = env, head, sample, device, ranks
        seeds = [run.settings["seed"] for run in runs]
        self.keys = {p: sample.placed(envs.stream(seeds, p).keys) for p in (TASKS, MEDIUM, EVALUATION)}
        self.epoch = sample.placed(numpy.array([self.epochs_done]))  # counted by train_epoch, for random numbers
        stacked = checkpoints.stack([{key: run.state[key] for key in checkpoints.TENSORS} for run in runs], device)
        self.theta = {name: p.requires_grad_() for name, p in stacked["theta"].items()}
        learned_alpha = {name: p.requires_grad_() for name, p in stacked["alpha"].items()}
        sizes = {
            name: torch.tensor([run.settings[name] or 0.0 for run in runs], dtype=torch.float64, device=device)
            for name in ("alpha", "beta", "beta_alpha", "eval_alpha")
        }
        self.alpha = learned_alpha or sizes["alpha"][:, None]  # (S, 1), or (S, 1, ...) each
        self.eval_alpha = (
            learned_alpha or torch.where(sizes["eval_alpha"] > 0, sizes["eval_alpha"], sizes["alpha"])[:, None]
        )
        self.learned = [*self.theta.values(), *learned_alpha.values()]
        step_sizes = [sizes["beta"]] * len(self.theta) + [sizes["beta_alpha"]] * len(learned_alpha)
        self.optimizer = OPTIMIZERS[self.settings["optimizer"]](self.learned, step_sizes, stacked["optimizer"])
        self.learner, self.schedules = learner_of(self.settings["algo"]), {}
        names = [name for name in self.learner.settings if self.settings[name] is not None]
        self.learner_options = {} if self.learner.each_epoch else {name: self.own_setting(name) for name in names}
        self.draws_per_gradient = self.settings["inner_steps"] + self.learner.losses_after  # up to a query's
        self.meta_learner = self.undirected = self.make_meta_learner()
        if self.settings["delta"] is not None:
            self.delta = torch.zeros(len(runs), dtype=torch.float64, device=device)  # set before every epoch
            self.meta_learner = directed(self.undirected, self.delta)

    @property
    def epochs_done(self):
        return self.runs[0].state["epoch"]

    def stream(self, purpose):
        return envs.Stream(self.keys[purpose], self.epoch)

    def make_meta_learner(self):
        """The one that --algo names, without the δ-step."""
        # The wrappers' order, from the outside in:
        # directed   the δ-step comes first, and all the rest is at the θ that it leaves;
        # penalised  ∇KL is taken at θ; inside of sharp it would be at θ + ρ g/‖g‖, and there it raises the KL at θ;
        # sharp      its g is the meta-gradient of all ranks' tasks;
        # ranks      sums up the meta-gradients of the ranks' own tasks, which are the learner's.
        settings = self.settings
        meta_learner = partial(self.learner.function, inner_steps=settings["inner_steps"])
        meta_learner = self.ranks.share(meta_learner, self.learned, self.learner.averages)
        if self.learner.sharp:
            meta_learner = maml.sharp(meta_learner, settings["rho"])
        if settings["kl_penalty"]:
            meta_learner = penalised(meta_learner, settings["kl_penalty"], self.ranks)
        return meta_learner

    def own_setting(self, name):
        """A setting of this learner alone: a word or whole number, which is the same in all runs, or (S, 1)."""
        values = [run.settings[name] for run in self.runs]
        if not isinstance(values[0], float):
            return values[0]
        return torch.tensor(values, dtype=torch.float64, device=self.device)[:, None]

    def set_schedules(self):
        """What the host knows of the epoch to come: δ of each run, and e.g. MAML++'s weights of the inner steps."""
        if self.settings["delta"] is not None:
            self.delta.copy_(torch.tensor([scheduled_delta(run) for run in self.runs], dtype=torch.float64))
        of_epoch = self.learner.each_epoch(self.settings, self.epochs_done) if self.learner.each_epoch else {}
        for name, value in of_epoch.items():
            if isinstance(value, list):  # in place: a recorded epoch reads the tensor of its recording
                numbers = torch.tensor(value, dtype=torch.float64)
                value = self.schedules.setdefault(name, torch.zeros_like(numbers, device=self.device)).copy_(numbers)
            self.learner_options[name] = value

    def only(self, kept):
        """The batch of those runs alone for which `kept` holds; None where there are none."""
        self.update_states()
        runs = [run for run, keep in zip(self.runs, kept, strict=True) if keep]
        return Batch(runs, self.env, self.head, self.sample, self.device, self.ranks, self.rows) if runs else None

    def position(self):
        """All of θ, a vector for each run: (S, N)."""
        return torch.cat([p.detach().flatten(1) for p in self.theta.values()], 1)

    def update_states(self):
        alpha = self.alpha if isinstance(self.alpha, dict) else {}
        tree = {"theta": self.theta, "alpha": alpha, "optimizer": self.optimizer.state}
        tree = checkpoints.to_cpu(tree)
        for i, run in enumerate(self.runs):
            run.state |= checkpoints.take(tree, i)

    def save(self):
        self.rows.append()
        if self.ranks.rank == 0:
            self.update_states()
            checkpoints.save(self.runs)

    def news(self):
        """What there is to say of the last epoch: algorithm, number of runs, mean return after adaptation."""
        return self.settings["algo"], len(self.runs), self.mean_return


def scheduled_delta(run):
    """A run's δ in the epoch to come."""
    delta, schedule = run.settings["delta"], run.settings["delta_schedule"]
    if schedule == "decay":
        return delta / (1 + run.state["epoch"] / 100)
    return 0.0 if schedule == "converged" and run.state["totals"]["converged"] else delta


def finish(failures, args):
    """Say which runs failed, and rewrite the report."""
    for line in sorted(failures):
        print(f"run.py: {line}", file=sys.stderr)
    root = folder_of_all(args)
    try:
        with checkpoints.locked(root, wait=True):  # another command may end just now
            wrote, left_out = report.write(root, args.window)
    except OSError:
        raise
    except Exception as error:  # the training is good, whatever other runs did to the report
        wrote, left_out = [], [f"{root}: the runs are good, but there is no report: {first_line(error)}"]
    for line in left_out:
        print(f"run.py: {line}", file=sys.stderr)
    for line in [] if args.quiet else wrote:
        print(line)


if __name__ == "__main__":
    main()
