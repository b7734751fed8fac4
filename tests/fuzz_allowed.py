"""What the fuzzer may see beside "refused" and "as torch", each with the reason.

Patterns (fnmatch) of a target, an argument and an outcome; the first reason that fits is enough.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

# Values that no argument has a use for: accepted only where `ALLOWED` says so.
NONSENSE = {
    "nan", "inf", "-inf", "complex", "bytes", "list_of_none", "list_of_text", "nested", "nan_pair",
    "dict_of_none", "set", "object", "no_length", "no_number", "numpy_texts", "int64", "text",
    "text_subclass", "tensor_complex",
}  # fmt: skip

# Counts of work to do, which a huge number asks for a huge amount of: not called with one.
WORK = {
    "order", "best_of", "bestof", "n", "workers", "steps", "episodes", "count", "num_layers",
    "members", "lanes", "directions", "rank", "copies", "particles", "reach",
}  # fmt: skip
HUGE = {"2**31", "2**63", "10**400"}

# Arguments that hold the caller's own code: what that raises is the caller's.
CODE = {
    "sampler", "mode", "grad_mode", "policy", "act", "closure", "callback", "function", "topology",
    "shaping", "sigma_schedule", "inertia", "jiggle", "weight", "where", "optimizers", "crossover",
    "normalizer", "include", "exclude", "noise", "schedulers", "log",
}  # fmt: skip
CALLABLES = {"class", "function", "module", "linear"}

# (target, argument, outcome, why)
ALLOWED = [
    ("*", "*", "memory", "more than there is was asked for, and torch says so"),
    ("*", "params", "unnamed *Error*", "torch.optim.Optimizer's own words"),
    ("*", "device", "unnamed *Error*", "torch.device's own words"),
    ("*", "map_location", "*", "torch.load's to judge"),
    ("*", "x", "accepted", "rows may hold any numbers"),
    ("*", "values", "accepted", "values may be any numbers"),
    ("*", "losses", "accepted", "losses may be any numbers"),
    ("*", "weights", "accepted", "weights may be any numbers"),
    ("*", "source", "accepted", "rows may hold any numbers"),
    ("TensorList*", "*", "*", "operands are torch's to judge, as those of its operators"),
    ("multi_copy", "*", "unnamed *Error*", "operands are named by their place"),
    ("Product.*", "other", "unnamed *Error*", "operands are named by their place"),
    ("Affine", "*", "*", "as in torch's norms"),
    ("*Attention", "num_heads", "*bool*", "True is one head in torch"),
    ("*", "*", "unnamed RuntimeError*without overflow", "too large for the parameters' dtype"),
    ("*", "domain", "unnamed *meta*", "torch's words on a tensor without numbers"),
    ("PSO", "max_velocity", "accepted", "no limit, or one for each parameter by name"),
    ("Inertia", "weight", "unnamed *inertia must*", "PSO's name of it"),
    ("FullyInformed", "phi", "unnamed *c1 [+] c2*", "which is phi"),
    ("PGPE", "sigma", "unnamed *got inf*", "the step size that follows from it"),
    ("SequentialSearch", "lr", "unnamed *spacing of a grid*", "which it is"),
    ("Minimize", "bounds", "accepted", "a list of pairs"),
    ("GradChain", "lrs", "unnamed *lr must*", "one of them"),
    ("UpdateToGrad", "opt", "unnamed *optimizers*", "the only one"),
    ("with_momentum", "optimizer", "unnamed *optimizers*", "the only one"),
    ("SwarmOfOptimizers", "members", "unnamed *particles must*", "a swarm's name of them"),
    ("Rollout.episodes", "count", "unnamed *episodes must*", "what is counted"),
    ("assign_", "*", "unnamed *module has no parameter*", "the module in question"),
    ("*", "state", "unnamed TypeError*positional arguments*", "the policy is called with a state"),
    ("multi_copy", "list1", "*must hold tensors*", "the list in question"),
    ("ring", "step", "accepted", "not used"),
    ("von_neumann", "step", "accepted", "not used"),
    ("Swarm", "called", "accepted", "a word for messages"),
    ("save_checkpoint", "part", "accepted", "plain values are saved as they are"),
    ("CartPole.set_idle", "mask", "accepted", "ignored: an idle lane costs nothing here"),
    ("PSO", "bounds", "accepted", "pairs, by name or for all"),
    ("*", "path", "unnamed *Error*", "the operating system's words on a file that is not there"),
    ("Checkpoints", "folder", "accepted", "any text names a folder"),
    ("CSVLog", "path", "accepted", "any text names a file"),
    ("Progress", "show", "accepted", "any names; a record without one shows nothing"),
    ("save_checkpoint", "path", "accepted", "any text names a file"),
    ("rand*", "like", "unnamed *module has no parameter*", "the module in question"),
    ("train", "steps", "hang*", "None is until the caller stops"),
    ("register_twin", "torch_class", "accepted", "any text is a pattern"),
    ("NES", "max_memory", "accepted", "a number of bytes as text"),
]


def verdict(target: str, argument: str, value: str, outcome: str) -> str | None:
    """Return why an outcome is in order; None if it is not."""
    if outcome in ("refused", "as torch"):
        return outcome
    if target.startswith("Perturbed") and value in ("generator", "bytes"):
        return "sizes as text, or used up by the first look at them, as in torch"
    if outcome == "accepted" and value not in NONSENSE:
        return "may make sense"
    if argument in CODE and value in CALLABLES and outcome.startswith(("unnamed", "accepted")):
        return "the caller's own code"
    for in_target, in_argument, in_outcome, why in ALLOWED:
        fits = fnmatchcase(target, in_target) and fnmatchcase(argument, in_argument)
        if fits and fnmatchcase(outcome, in_outcome):
            return why
    return None


def to_call(argument: str, value: str) -> bool:
    """Whether the fuzzer tries a value at all."""
    return not (argument in WORK and value in HUGE)
