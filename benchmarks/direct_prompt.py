"""What SmolLM2-135M makes of short briefs, before and after, and how often its answer can be used.

For each English brief: a prompt, a scene written freely (its second try, guided, is not counted), and a scene written
field by field. For each Chinese brief: what is passed on. ``--model`` names another folder or GGUF file. Prints the
texts, then one JSON line: shares of the briefs, tokens a second, and milliseconds of an answer that was given before.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.direct_prompt import Answers, DirectedPrompt, direct_prompt
from pipeline.language.language_model import open_language_model
from pipeline.model_cache import ModelCache
from pipeline.residency import TorchResidency
from tests.pipeline.language_models import smollm2

BRIEFS: dict[str, list[str]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
ASKED: dict[str, dict[str, Any]] = {
    "prompt, free": {"mode": "prompt"},
    "scene, free": {"mode": "scene"},
    "scene, guided": {"mode": "scene", "guided": True},
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks direct_prompt", description=__doc__)
    parser.add_argument("--model", type=Path, help="a folder or .gguf file; SmolLM2-135M-Instruct unless given")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    chosen = parser.parse_args(arguments)
    settings = {"temperature": chosen.temperature, "max_new_tokens": chosen.max_new_tokens}
    print(json.dumps(measure(chosen.model or smollm2(), chosen.device, settings)))


def measure(path: Path, device: str, settings: dict[str, Any]) -> dict[str, Any]:
    model, cache, answers = open_language_model(path), ModelCache(TorchResidency(device), 2**36), Answers()
    with model.use(cache):  # so that no answer's time holds the loading
        pass
    tokens, seconds = 0, 0.0
    ways: dict[str, list[str]] = {name: [] for name in ASKED}
    again: list[float] = []
    for brief in BRIEFS["English"]:
        for name, how in ASKED.items():
            start = time.perf_counter()
            answer = direct_prompt(cache, model, brief, **how, **settings, answers=answers)
            seconds += time.perf_counter() - start
            tokens += answer.tokens
            ways[name].append(answer.way)
            _show(brief, name, answer)
        start = time.perf_counter()
        direct_prompt(cache, model, brief, **ASKED["scene, guided"], **settings, answers=answers)
        again.append(1000 * (time.perf_counter() - start))
    passed_on = []
    for brief in BRIEFS["Chinese"]:
        answer = direct_prompt(cache, model, brief, mode="scene", guided=True, **settings, answers=answers)
        passed_on.append(answer.way == "brief" and answer.prompt == brief)
        _show(brief, "scene, guided", answer)
    return {
        "model": model.name,
        "english_briefs": len(BRIEFS["English"]),
        "chinese_briefs": len(BRIEFS["Chinese"]),
        "free_prompts_used": _share(ways["prompt, free"], "free"),
        "free_scenes_used": _share(ways["scene, free"], "free"),
        "guided_scenes_used": _share(ways["scene, guided"], "guided"),
        "chinese_passed_on": sum(passed_on) / len(passed_on),
        "tokens_per_second": round(tokens / seconds, 1),
        "ms_asked_again": round(sorted(again)[len(again) // 2], 3),
    }


def _share(ways: list[str], way: str) -> float:
    return round(ways.count(way) / len(ways), 3)


def _show(brief: str, asked: str, answer: DirectedPrompt) -> None:
    print(f"\n{brief}  [{asked} -> {answer.way}, {answer.tokens} tokens]\n  prompt: {answer.prompt}", flush=True)
    if answer.negative_prompt:
        print(f"  avoid:  {answer.negative_prompt}")
    for notice in answer.notices:
        print(f"  notice: {notice}")
