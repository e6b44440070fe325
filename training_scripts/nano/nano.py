"""Makes the nano family from nothing: every stage of the recipe, one after another.

    python training_scripts/nano/nano.py WORK            (hours on two cores)
    python training_scripts/nano/nano.py WORK --quick    (minutes: shows that the parts fit together, and no more)

Each stage is a script of its own, which also runs alone, and has a folder in WORK with its figures and their plot; see
`stages.py`. A finished stage is reused as long as nothing that it is made from has changed; one that was interrupted
goes on. flite (Debian, Ubuntu: apt install flite) and `pip install pocketsphinx jiwer` are needed.
"""

import sys

import make_corpus
import make_speech
import train_codec
from stages import stage_arguments

STAGES = (make_corpus, make_speech, train_codec)


def main(arguments: list[str] | None = None) -> None:
    """Runs the stages."""
    options = stage_arguments(__doc__).parse_args(arguments)
    for stage in STAGES:
        stage.main([str(options.work), *(["--quick"] if options.quick else [])])


if __name__ == "__main__":
    sys.exit(main())
