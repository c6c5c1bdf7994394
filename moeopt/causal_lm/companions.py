"""What lies beside an engine of a language model for people who have the bundle only: config, tokenizer, licence, card.

moeopt reads none of these files; they are listed in the manifest with their sha256, as everything else is.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeopt.hub_cache import cached_file

TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)
LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "NOTICE", "USE_POLICY.md")
_UNKNOWN = "not known where the engine was made"


def write_companions(folder: Path, caller: Mapping[str, Any], runs_in: Mapping[str, str]) -> None:
    """Write ``config.json``, ``generation_config.json``, the tokenizer's files, the licence and ``README.md``.

    Args:
        folder: of the bundle that is being written.
        caller: the signature that ``export_causal_lm`` made; its config names where the model came from, and tokenizer
            and licence are copied from there: a local directory, or the local Hugging Face cache.
        runs_in: other runtimes -> "" where files for them are in ``folder``, or why they are not.
    """
    config = {key: value for key, value in caller["config"].items() if key != "_name_or_path"}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    told = {key: value for key, value in caller["generation_config"].items() if value is not None}
    (folder / "generation_config.json").write_text(json.dumps(told, indent=2))
    found = [name for name in (*TOKENIZER, *LICENCES) if _copied(caller["config"].get("_name_or_path"), name, folder)]
    (folder / "README.md").write_text(_card(caller, found, runs_in))


def _copied(source: object, name: str, folder: Path) -> bool:
    if not isinstance(source, str) or not source:
        return False
    path = Path(source) / name
    if not Path(source).is_dir():
        cached = cached_file(source, name)
        if cached is None:
            return False
        path = cached
    if not path.is_file():
        return False
    shutil.copyfile(path, folder / name)
    return True


def _card(caller: Mapping[str, Any], found: list[str], runs_in: Mapping[str, str]) -> str:
    tokenizer = any(name in TOKENIZER for name in found)
    licence = [name for name in found if name in LICENCES]
    loading = "AutoTokenizer.from_pretrained(bundle)" if tokenizer else "AutoTokenizer.from_pretrained(...)"
    lines = [
        f"# {caller['architecture']}, an engine made by moeopt",
        "",
        "`model.onnx` and its weights: the model with its key/value cache as inputs and outputs. `certificate.json` "
        "says how its numbers were compared with the original's; `moeopt verify .` compares again on this machine.",
        "",
        "```python",
        "import moeopt",
        "from transformers import AutoTokenizer",
        "",
        'bundle = "path/of/this/directory"',
        f"engine, tokenizer = moeopt.load(bundle), {loading}",
        'print(tokenizer.decode(engine.generate(**tokenizer("Any text", return_tensors="pt"), max_new_tokens=20)[0]))',
        "```",
        "",
        f"Tokenizer: {'in this directory' if tokenizer else f'{_UNKNOWN}; use that of the model'}.",
        f"Licence of the weights: {', '.join(licence) or f'{_UNKNOWN}; ask who gave you the model'}.",
    ]
    for runtime, why_not in runs_in.items():
        lines.append(f"{runtime}: {why_not or 'files are in this directory'}.")
    return "\n".join(lines) + "\n"
