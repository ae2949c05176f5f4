"""Command line: check, split and pack data; train; evaluate; predict; report; export; convert.

python main.py --config=configs/shapes.py --workdir=/tmp/shapes
python main.py --help
"""

from dssn_jax.commands import cli

if __name__ == "__main__":
    cli()
