"""Sampling at the last stage: llama.cpp sampler chains, so that token ids cross the wire and not logits.

Randomness at a position derives from (seed, position) alone (``hot.draw_seed``): a replay after a failure draws the
same tokens. Drawing itself is native (``hot.HotStage.draw``).
Log-probabilities are of the model's own distribution, before temperature and penalties, as OpenAI's are.
"""

from __future__ import annotations

from typing import Any

from dwarfstar_engine import native
from dwarfstar_engine.stage.llama import LlamaSlice
from dwarfstar_engine.stage.llamacpp import llama
from dwarfstar_engine.wire.frames import SampledRow
from dwarfstar_engine.wire.sampler_spec import SamplerSpec


class Sampler:
    """One slot's sampler. Plain greedy needs no chain; everything else is a llama.cpp chain."""

    def __init__(self, spec: SamplerSpec, slice_: LlamaSlice, slot: int) -> None:
        self.spec, self._slice, self._slot = spec, slice_, slot
        self._chain: Any = None
        dist = -1  # index of the drawing sampler in the chain
        greedy = spec.temperature <= 0
        general = spec.logprobs >= 0
        edits = bool(spec.logit_bias) or spec.repeat_penalty != 1.0 or spec.frequency_penalty or spec.presence_penalty
        if greedy and not edits:
            slice_.hot.set_sampler(slot, chain=None, dist=-1, seed=0, general=general)
            return
        chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        vocab = slice_.vocab_size
        if spec.logit_bias:
            biases = (llama.llama_logit_bias * len(spec.logit_bias))()
            for entry, (token, bias) in zip(biases, spec.logit_bias, strict=True):
                entry.token, entry.bias = token, bias
            llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_logit_bias(vocab, len(biases), biases))
        if spec.repeat_penalty != 1.0 and spec.repeat_last_n != 0:
            # Sees prompt and answer; a window of its own, as frequency and presence count the answer only.
            repeat = llama.llama_sampler_init_penalties(vocab, spec.repeat_last_n, spec.repeat_penalty, 0.0, 0.0)
            for token in spec.prompt_tail:
                llama.llama_sampler_accept(repeat, token)
            llama.llama_sampler_chain_add(chain, repeat)
        if spec.frequency_penalty or spec.presence_penalty:
            counts = llama.llama_sampler_init_penalties(
                vocab, slice_.options.context, 1.0, spec.frequency_penalty, spec.presence_penalty
            )
            for token in spec.answer:
                llama.llama_sampler_accept(counts, token)
            llama.llama_sampler_chain_add(chain, counts)
        if greedy:
            llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_greedy())
        else:
            if spec.top_k > 0:
                llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_top_k(spec.top_k))
            if spec.top_p < 1.0:
                llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_top_p(spec.top_p, 1))
            if spec.min_p > 0.0:
                llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_min_p(spec.min_p, 1))
            llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_temp(spec.temperature))
            dist = llama.llama_sampler_chain_n(chain)
            llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_dist(0))
        self._chain = chain
        slice_.hot.set_sampler(slot, chain=chain, dist=dist, seed=spec.seed, general=general)

    def sample(self, row: int, position: int, guess: int, prompt: bool) -> SampledRow | None:
        """Draw the token that follows row ``row`` of the last step, whose position is ``position``.

        guess: that row's token if it was guessed, else -1; a wrong one gives None.
        """
        token = self._slice.hot.draw(row, self._slot, position, guess=guess, prompt=prompt)
        if token is None or self.spec.logprobs < 0:
            return None if token is None else SampledRow(self._slot, token, 0.0, ())
        logits = self._slice.logits(row, self._slot, prompt=prompt)
        chosen, top = native.top_logprobs(logits, self._slice.vocab_size, token, self.spec.logprobs)
        return SampledRow(self._slot, token, chosen, top)

    def close(self) -> None:
        """Free the chain. Idempotent."""
        self._slice.hot.clear_sampler(self._slot)
        if self._chain is not None:
            llama.llama_sampler_free(self._chain)
            self._chain = None
