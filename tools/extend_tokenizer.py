"""Make a sentencepiece model fit for speech streams: `python tools/extend_tokenizer.py MODEL OUTPUT --languages en,ja`.

OUTPUT gets all pieces of MODEL (Kyutai's, Llama's, your own) under their ids, and after them what is missing: PAD, end
of sentence, a prompt symbol for every task and language. `--symbols '[laugh],[um]'` adds symbols that your text holds,
`--donor OTHER.model` the pieces of another model, for example of another language, `--size N` brings it to exactly N
pieces. Prints what to write into the config.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(arguments: list[str]) -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", type=Path)
    parser.add_argument("output", metavar="OUTPUT", type=Path)
    parser.add_argument("--languages", required=True, help="that the model shall write, such as en,ja,pt-BR")
    parser.add_argument("--symbols", default="", help="separated by commas")
    parser.add_argument("--donor", type=Path, help="a model of the same kind")
    parser.add_argument("--size", type=int, help="exact number of pieces")
    try:
        return _extend(parser.parse_args(arguments))
    except (ValueError, OSError) as error:
        print(f"extend_tokenizer: {error}", file=sys.stderr)
        return 1


def _extend(options: argparse.Namespace) -> int:
    from megaspeech.data.tasks import LANGUAGE
    from megaspeech.data.tokenizer_extension import extend_tokenizer

    languages = [language.strip() for language in options.languages.split(",")]
    for language in languages:
        if not LANGUAGE.fullmatch(language):
            raise ValueError(f"--languages: {language!r} is no code such as en, yue or pt-BR")
    if options.output.exists():
        raise ValueError(f"{options.output}: exists already; name another file, or remove it")
    before = options.model.read_bytes()
    tokenizer = extend_tokenizer(
        before,
        languages=languages,
        symbols=filter(None, options.symbols.split(",")),
        donor=options.donor.read_bytes() if options.donor else None,
        vocabulary_size=options.size,
        name=str(options.model),
    )
    options.output.write_bytes(tokenizer.model)
    print(f"{options.output}: {tokenizer.vocabulary_size} pieces")
    print(f'[data]\ntokenizer = "{options.output}"')
    print(f"[streams]\ntext_cardinality = {tokenizer.vocabulary_size}")
    print(f"text_pad_id = {tokenizer.processor.pad_id()}\ntext_end_pad_id = {tokenizer.processor.unk_id()}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
