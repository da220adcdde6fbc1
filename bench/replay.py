"""What gymnasium alone takes for the episodes of a rollout: the limit that sampling in worker processes can reach."""

import contextlib
import multiprocessing
import time

import numpy as np

from harness.gyms import seed_of


def set_barrier(of_all_processes):
    global barrier
    barrier = of_all_processes


@contextlib.contextmanager
def replayers(count):
    """A pool of processes for `replay_rates`."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(count, set_barrier, (context.Barrier(count),)) as pool:
        yield pool


def replay(env, gravities, seeds, episodes, together):
    """Steps a second of gymnasium alone: these episodes, one after the other, with the reset that each begins with.

    together: wait until all processes are about to begin. Raises RuntimeError where an episode is not the recorded one.
    """
    env.dynamics.reset(0, gravities[:1], seeds[0])  # which makes the environment; no episode needs that again
    if together:
        barrier.wait()
    steps, seconds = 0, 0.0
    for gravity, seed, actions in zip(gravities, seeds, episodes, strict=True):
        start = time.perf_counter()
        env.dynamics.reset(0, [gravity], seed)
        step, over = env.dynamics.instances[0].step, []
        for action in actions:
            over.append(step(action)[2:4])
        seconds, steps = seconds + time.perf_counter() - start, steps + len(actions)
        if any(map(any, over[:-1])) or not (any(over[-1]) or len(actions) == env.horizon):
            raise RuntimeError(f"gravity {gravity:g}, seed {seed}: replayed, the episode ends elsewhere")
    return steps / seconds


def replay_rates(env, phi, noise, trajectories, pool, count, turn):
    """Steps a second of one process while the others wait, and of `count` at once, each with its share of the episodes.

    phi, noise, trajectories: as `envs.rollout` takes and returns them; turn: which share the single process has.
    """
    gravities = np.broadcast_to(phi.astype(float), noise["reset"].shape[:3]).ravel().tolist()
    seeds = [seed_of(u) for u in noise["reset"].ravel().tolist()]
    lengths, actions = trajectories["mask"].sum(-1).flatten().tolist(), trajectories["actions"].flatten(0, 2)
    episodes = [taken[:n].tolist() for taken, n in zip(actions, lengths, strict=True)]
    shares = [(env, *(x[i::count] for x in (gravities, seeds, episodes))) for i in range(count)]
    alone = pool.apply(replay, (*shares[turn % count], False))
    return alone, sum(pool.starmap(replay, [(*share, True) for share in shares], chunksize=1))
