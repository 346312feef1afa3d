"""A judge behind `judge.py serve` as the reward of another trainer. Standard library alone: copy this one file.

    python judge.py serve --model runs/grpo            # prints its address; elsewhere: export JUDGE_URL=http://host:8377

    TRL    GRPOTrainer(model, reward_funcs=trl_reward, ...)
    verl   custom_reward_function.path=reward_client.py
           custom_reward_function.name=verl_rewards    with reward_model.reward_manager=batch
           custom_reward_function.name=verl_reward     with the default manager, which asks for one sample at a time

A reward is the share of comparisons that a response wins against the other responses to its prompt (0 to 1). The mean
over a group is always 0.5, so look at something else to see progress. `verl_reward` sees no other response and
compares with the ground truth, which then must be a good response. In verl the prompt is `extra_info["prompt"]` or
`extra_info["question"]`.
"""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.error
import urllib.request
from typing import Any

URL = os.environ.get("JUDGE_URL", "http://127.0.0.1:8377")
TIMEOUT = 3600.0  # seconds that the judge may take for one call
WAITS = (1, 5, 30)  # seconds before a request is repeated when the judge does not answer


def trl_reward(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
    """As GRPOTrainer calls it: texts or chats, each prompt once for each of its completions."""
    return win_rates(prompts, completions)


def verl_rewards(data_sources: Any, solution_strs: list[str], ground_truths: Any, extra_infos: list[Any],
                 **_: Any) -> list[float]:
    """As verl's batch manager calls it."""
    return win_rates([prompt_of(extra) for extra in extra_infos], solution_strs)


def verl_reward(data_source: Any, solution_str: str, ground_truth: Any, extra_info: Any = None, **_: Any) -> float:
    """As verl's default manager calls it: 1 if the response is better than the ground truth, 0 if worse."""
    prompt = prompt_of(extra_info)
    return win_rates([prompt, prompt], [solution_str, str(ground_truth)])[0]


def prompt_of(extra: Any) -> Any:
    known = extra if isinstance(extra, dict) else {}
    if (prompt := known.get("prompt", known.get("question"))) is None:
        raise ValueError("extra_info needs a 'prompt' or a 'question': put the request there when you make the data")
    return prompt.tolist() if hasattr(prompt, "tolist") else prompt  # parquet gives messages as an array


def win_rates(prompts: list[Any], completions: list[Any]) -> list[float]:
    """One reward a completion. Completions of equal prompts are compared with each other, wherever they stand."""
    groups: dict[str, list[int]] = {}
    for place, prompt in enumerate(prompts):
        groups.setdefault(json.dumps(prompt, sort_keys=True, default=str), []).append(place)
    asked = [{"prompt": prompts[of[0]], "responses": [completions[place] for place in of]} for of in groups.values()]
    answer = post("/rewards", {"groups": asked})
    if answer["silent"] and not answer["verdicts"]:
        print(f"reward_client: no output of the judge has a verdict: {answer['silent']}", file=sys.stderr)
    rewards = [0.0] * len(prompts)
    for of, values in zip(groups.values(), answer["rewards"], strict=True):
        for place, value in zip(of, values, strict=True):
            rewards[place] = value
    return rewards


def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """What the judge answers; RuntimeError with its words if it refuses, or after some tries."""
    data = json.dumps(body, default=str).encode()
    request = urllib.request.Request(URL + path, data, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for wait in (*WAITS, None):
        try:
            with opener.open(request, timeout=TIMEOUT) as answer:
                return dict(json.load(answer))
        except urllib.error.HTTPError as error:
            said, retry = error.read(2000).decode(errors="replace"), error.code >= 500
        except OSError as error:
            said, retry = str(error), True
        if wait is None or not retry:
            break
        time.sleep(wait)
    raise RuntimeError(f"{URL}{path}: {said}")
