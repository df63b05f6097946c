"""Families that are refused, and why."""

from __future__ import annotations

_REASONS = {
    "it is an encoder with a causal mask, with norms after each layer; nobody prunes it as a decoder": """
        bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta
        roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod xlm xlnet reformer""",
    "it is the decoder of an encoder-decoder model, with attention to an encoder": """
        bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart prophetnet trocr whisper""",
    "it has neither attention nor a feed-forward network, or both are one recurrent block": """
        mamba mamba2 falcon_mamba rwkv xlstm nemotron_h""",
    "several of its layers share weights, or it runs its layers several times": """
        zamba zamba2 hrm_text blt gemma3n gemma3n_text gemma4_assistant gemma4_unified_assistant""",
    "it makes sound or reads images with parts of its own in the decoder": """
        git moshi musicgen musicgen_melody mllama fuyu phi4_multimodal moss_transcribe_diarize emu3""",
    "a norm inside its feed-forward network runs over all channels, so none is independent of the others": "bitnet",
    "its layers are built in a way of their own": "openai-gpt cpmant ctrl bamba",
    "its widths lie in configs inside the config, which cannot differ by layer": "dbrx",
}


REFUSED: dict[str, str] = {family: reason for reason, families in _REASONS.items() for family in families.split()}
"""Families that are refused, and why. What is in neither table, nobody has looked at."""
