"""The rival: run.py's CartPole epoch in JAX, one jitted function for the whole epoch.

    python bench/jax_rival.py --algo maml --runs 16 --design plain

prints one line of JSON. Needs jax alone (`pip install jax`; it is not in requirements.txt), nothing of this project.
Every trajectory has its full length, as in this project's own benchmark. Held to one core unless --all-cores.

Two designs compute the same. plain: as JAX's users write it, jax.grad through the inner step, and vmap over tasks and
runs. tuned: as fast as we could make it on a CPU, one task after the other, the chain rule written out.

Axes: S runs, M tasks, H time steps, K trajectories; time comes before trajectories, as lax.scan stacks it.
Parameters are a list of (weight, bias) with leaves (S, ...); adapted to tasks, (S, M, ...). What concerns a single task
is written for a single task, and batched below. Trajectories are (obs, actions, rewards): (H, K, 4), (H, K), (H, K).
"""

import argparse
import json
import os
import sys
import time
from functools import partial

try:
    import jax
    import jax.numpy as jnp
except ModuleNotFoundError:
    MISSING = "bench/jax_rival.py needs jax, which is not in requirements.txt: pip install jax"
    if __name__ == "__main__":
        sys.exit(MISSING)
    raise ImportError(MISSING) from None

ALGORITHMS = ("maml", "fomaml", "directed-maml", "directed-fomaml")
DESIGNS = ("tuned", "plain")
M, K, H = 5, 10, 200
ALPHA, BETA, DELTA, GAMMA = 0.001, 0.001, 0.005, 0.99
LOW, HIGH = 5.0, 15.0  # gravity, m/s²
LAYERS = (4, 64, 64, 2)


# --- one task ---


def init(key):
    """θ of one run, drawn like torch.nn.Linear's: uniform within ±1/√in."""

    def uniform(key, *shape):
        return jax.random.uniform(key, shape, minval=-1, maxval=1)

    keys = jax.random.split(key, (len(LAYERS) - 1, 2))
    return [
        (uniform(of_weight, n_in, n_out) / n_in**0.5, uniform(of_bias, n_out) / n_in**0.5)
        for (of_weight, of_bias), n_in, n_out in zip(keys, LAYERS[:-1], LAYERS[1:], strict=True)
    ]


def policy(params, obs):
    """Logits (..., 2) of the tanh MLP at obs (..., 4)."""
    for weight, bias in params[:-1]:
        obs = jnp.tanh(obs @ weight + bias)
    weight, bias = params[-1]
    return obs @ weight + bias


def cartpole(state, action, gravity):
    """One step of gymnasium's CartPole-v1; states (..., 4), actions (...). Nothing terminates."""
    x_dot, angle, angle_dot = (state[..., i] for i in (1, 2, 3))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    force = jnp.where(action == 1, 10.0, -10.0)
    temp = (force + 0.05 * angle_dot**2 * sin) / 1.1
    angle_acc = (gravity * sin - cos * temp) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
    x_acc = temp - 0.05 * angle_acc * cos / 1.1
    return state + 0.02 * jnp.stack([x_dot, x_acc, angle_dot, angle_acc], -1)


def rollout(params, gravity, key):
    """K trajectories of H steps under π(params); actions by the Gumbel-max trick."""
    of_start, of_actions = jax.random.split(key)
    start = jax.random.uniform(of_start, (K, 4), minval=-0.05, maxval=0.05)
    noise = jax.random.gumbel(of_actions, (H, K, 2))

    def step(state, noise):
        action = (policy(params, state) + noise).argmax(-1)
        return cartpole(state, action, gravity), (state, action, jnp.ones(K))

    return jax.lax.scan(step, start, noise)[1]


def task_loss(params, trajectories):
    """L = −J of one task: rewards to go, whitened, times π/stop(π), summed over time, averaged over trajectories."""
    obs, actions, rewards = trajectories
    steps = jnp.arange(H)
    ahead = steps - steps[:, None]  # (H, H): from t (row) to u (column)
    returns_to_go = jnp.where(ahead >= 0, GAMMA ** jnp.maximum(ahead, 0), 0.0) @ rewards
    advantages = (returns_to_go - returns_to_go.mean()) / (returns_to_go.std() + 1e-8)
    logits = policy(params, obs.reshape(H * K, 4)).reshape(H, K, 2)
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), actions[..., None], -1)[..., 0]
    return -(jnp.exp(log_probs - jax.lax.stop_gradient(log_probs)) * advantages).sum(0).mean()


gradient = jax.grad(task_loss)


def hessian_product(params, trajectories, vector):
    """∇²L · vector, forward over reverse."""
    return jax.jvp(lambda params: gradient(params, trajectories), (params,), (vector,))[1]


# --- all tasks of all runs ---


def descend(params, gradients, step_size):
    return jax.tree.map(lambda p, g: p - step_size * g, params, gradients)


def per_task(theta, num_tasks=M):
    """θ (S, ...) once for each task: (S, M, ...)."""
    return jax.tree.map(lambda p: jnp.broadcast_to(p[:, None], (len(p), num_tasks, *p.shape[1:])), theta)


def one_by_one(function):
    """`function` of one task over arguments (S, M, ...), one task after the other.

    Used for gradients: the activations of one task stay in the cache, those of all tasks under vmap do not.
    """

    def mapped(*args):
        runs, tasks = jax.tree.leaves(args)[0].shape[:2]
        args = jax.tree.map(lambda x: x.reshape(runs * tasks, *x.shape[2:]), args)
        result = jax.lax.map(lambda args: function(*args), args)
        return jax.tree.map(lambda x: x.reshape(runs, tasks, *x.shape[1:]), result)

    return mapped


def all_at_once(function):
    """`function` of one task over arguments (S, M, ...), batched."""
    return jax.vmap(jax.vmap(function))


def rollouts(params, gravities, keys, shared):
    """Trajectories (S, M, ...) at gravities (S, M), a key per run; shared: params are θ (S, ...), else (S, M, ...)."""
    keys = jax.vmap(partial(jax.random.split, num=gravities.shape[1]))(keys)
    return jax.vmap(jax.vmap(rollout, in_axes=(None if shared else 0, 0, 0)))(params, gravities, keys)


def meta_gradient(theta, support, sample_query, second_order=True):
    """Σᵢ ∇_θ L_Tᵢ(θ'ᵢ) of each run: (S, ...), with θ'ᵢ = θ − α ∇L_Tᵢ(θ); first order: Σᵢ ∇_θ' L_Tᵢ(θ'ᵢ).

    support: trajectories (S, M, ...) under θ; sample_query: params (S, M, ...) -> trajectories under them.
    The chain rule is written out, ∇_θ = (I − α ∇²L) ∇_θ', so that the Hessian product can be forward over reverse:
    jax.grad through the inner step is reverse over reverse, which takes a tenth longer.
    """
    theta = per_task(theta)
    adapted = descend(theta, one_by_one(gradient)(theta, support), ALPHA)

    def of_task(theta, adapted, support, query):
        outer = gradient(adapted, query)
        return descend(outer, hessian_product(theta, support, outer), ALPHA) if second_order else outer

    gradients = one_by_one(of_task)(theta, adapted, support, sample_query(adapted))
    return jax.tree.map(lambda g: g.sum(1), gradients)


def plain_meta_gradient(theta, gravities, of_support, of_query, second_order=True):
    """As `meta_gradient` on the trajectories at gravities (S, M) from two keys of each run, by jax.grad alone."""

    def query_loss(theta, gravity, of_support, of_query):
        gradients = gradient(theta, rollout(jax.lax.stop_gradient(theta), gravity, of_support))
        adapted = descend(theta, gradients if second_order else jax.lax.stop_gradient(gradients), ALPHA)
        return task_loss(adapted, rollout(jax.lax.stop_gradient(adapted), gravity, of_query))

    def of_run(theta, gravities, of_support, of_query):
        keys = (jax.random.split(key, len(gravities)) for key in (of_support, of_query))
        query_losses = jax.vmap(query_loss, in_axes=(None, 0, 0, 0))
        return jax.grad(lambda theta, *args: query_losses(theta, *args).sum())(theta, gravities, *keys)

    return jax.vmap(of_run)(theta, gravities, of_support, of_query)


def medium_step(theta, trajectories, batched=one_by_one):
    """θ ← θ − δ ∇L_med(θ) of each run, on trajectories (S, 1, ...)."""
    gradients = batched(gradient)(per_task(theta, 1), trajectories)
    return descend(theta, jax.tree.map(lambda g: g[:, 0], gradients), DELTA)


def epoch(theta, keys, algo, design="tuned"):
    """One epoch of Algorithm 1 for S runs: θ (S, ...), a key for each -> the new θ."""
    second_order, tuned = not algo.endswith("fomaml"), design == "tuned"
    of_medium, of_tasks, of_support, of_query = jax.vmap(partial(jax.random.split, num=4), out_axes=1)(keys)
    if algo.startswith("directed-"):
        medium = jnp.full((len(keys), 1), (LOW + HIGH) / 2)
        trajectories = rollouts(theta, medium, of_medium, shared=True)
        theta = medium_step(theta, trajectories, one_by_one if tuned else all_at_once)
    gravities = jax.vmap(lambda key: jax.random.uniform(key, (M,), minval=LOW, maxval=HIGH))(of_tasks)
    if not tuned:
        return descend(theta, plain_meta_gradient(theta, gravities, of_support, of_query, second_order), BETA)
    support = rollouts(theta, gravities, of_support, shared=True)
    sample_query = partial(rollouts, gravities=gravities, keys=of_query, shared=False)
    return descend(theta, meta_gradient(theta, support, sample_query, second_order), BETA)


# --- the measurement ---


def hold_to_one_core():
    """Before JAX's first computation in this process; later it has no effect.

    NPROC sets the size of XLA's thread pool. XLA_FLAGS' intra_op_parallelism_threads=1, which is often recommended,
    does not hold it to one core: 1.6 cores were busy.
    """
    os.environ["NPROC"] = "1"
    os.environ["XLA_FLAGS"] = f"--xla_cpu_multi_thread_eigen=false {os.environ.get('XLA_FLAGS', '')}".rstrip()


def measure(algo, runs, seconds, design="tuned", all_cores=False):
    """Trains `runs` runs as one program for so many seconds; call it in a process of its own.

    Returns seconds: "compile" of the first call, compiling included, "epoch" the median after it, "cpu" the processor
    time of that epoch (one core: about the same); and "env_steps" an epoch. All are of all runs together.
    """
    if algo not in ALGORITHMS or design not in DESIGNS or runs < 1:
        raise ValueError(
            f"measure: algo {algo!r}, design {design!r}, runs {runs}; expected one of {', '.join(ALGORITHMS)}, one of "
            f"{', '.join(DESIGNS)}, and runs >= 1"
        )
    if not all_cores:
        hold_to_one_core()
    keys = jax.random.split(jax.random.key(0), runs)
    theta = jax.vmap(init)(keys)

    @partial(jax.jit, donate_argnums=0)
    def train_epoch(theta, index):
        return epoch(theta, jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index), algo, design)

    epochs, end = [], None
    while end is None or len(epochs) < 2 or time.perf_counter() < end:
        start, cpu_start = time.perf_counter(), time.process_time()
        theta = jax.block_until_ready(train_epoch(theta, len(epochs)))
        epochs.append((time.perf_counter() - start, time.process_time() - cpu_start))
        end = end or time.perf_counter() + seconds
    (first, _), *rest = epochs
    median, cpu = sorted(rest)[len(rest) // 2]
    num_batches = 2 * M + algo.startswith("directed-")  # of K trajectories
    return {"compile": first, "epoch": median, "cpu": cpu, "env_steps": runs * num_batches * K * H}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algo", choices=ALGORITHMS, default="maml", help="(default maml)")
    parser.add_argument("--runs", type=int, default=1, help="S (default 1)")
    parser.add_argument("--design", choices=DESIGNS, default="tuned", help="(default tuned)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of epochs after the first (default 2)")
    parser.add_argument("--all-cores", action="store_true", help="let XLA use every core")
    args = parser.parse_args()
    print(json.dumps(vars(args) | measure(args.algo, args.runs, args.seconds, args.design, args.all_cores)))


if __name__ == "__main__":
    main()
