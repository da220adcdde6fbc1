"""Everything that a reader of the algorithm need not read. `from harness import load` opens a trained run."""


def load(folder, trusted_env=None):
    """The `Policy` of a run's folder: see harness/trained.py."""
    from harness import trained  # on use: it needs gymnasium, and most of harness/ does not

    return trained.load(folder, trusted_env)
