"""``python -m perturbed``: the facts that a bug report or a benchmark needs."""

from __future__ import annotations

import os
import platform

import torch

import perturbed
from perturbed import _C


def report() -> list[tuple[str, str]]:
    """Collect the facts as pairs of a name and a line of text."""
    build = _C.build_info()
    target = int(build["torch_target"])  # [major][minor][patch][5 bytes of ABI tag]
    optimised = "optimised" if build["optimised"] else "not optimised (DEBUG=1)"
    usable = ", ".join(_C.cpu_capabilities())
    if build["cuda"]:
        kernels = f"built in, for {build['cuda_archs'] or 'the GPU of the build machine'}"
    else:
        kernels = "not built in"
    return [
        ("perturbed", f"{perturbed.__version__}, noise contract {build['noise_contract']}"),
        ("package", os.path.dirname(os.path.abspath(perturbed.__file__))),
        ("python", f"{platform.python_version()}, {platform.platform()}"),
        ("torch", torch.__version__),
        ("built for", f"torch {target >> 56}.{target >> 48 & 0xFF} and newer"),
        ("compiler", f"{build['compiler']}, {optimised}"),
        ("cpu kernels", f"{_C.cpu_capability()}; PERTURBED_CPU chooses one of {usable}"),
        ("threads", str(torch.get_num_threads())),
        ("cuda kernels", kernels),
        ("cuda of torch", torch.version.cuda or "none, a CPU build"),
        *(("device", device) for device in devices()),
    ]


def devices() -> list[str]:
    """Describe every device that torch can use here."""
    lines = ["cpu"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(
            f"cuda:{index} {properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB"
        )
    return lines


def main() -> None:
    """Print the facts, one a line."""
    pairs = report()
    width = max(len(name) for name, _ in pairs)
    for name, text in pairs:
        print(f"{name:<{width}}  {text}")


if __name__ == "__main__":
    main()
