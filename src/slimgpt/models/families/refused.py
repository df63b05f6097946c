"""Families that are refused, and why."""

from __future__ import annotations

_REASONS = {
    "it is an encoder with a causal mask, with norms after each layer; nobody prunes it as a decoder": """
        bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta
        roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod xlm xlnet reformer""",
    "it is the decoder of an encoder-decoder model, with attention to an encoder": """
        blip florence2 pix2struct pp_formulanet t5gemma2 udop vision-encoder-decoder
        bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart prophetnet trocr whisper""",
    "it has neither attention nor a feed-forward network, or both are one recurrent block": """
        mamba mamba2 falcon_mamba rwkv xlstm""",
    "several of its layers share weights, or it runs its layers several times": """
        mistral_large4 mistral_large4_text
        zamba zamba2 hrm_text blt""",
    "it drafts for another model and attends to the keys and values of that": """
        gemma4_assistant gemma4_unified_assistant""",
    "four streams of hidden states run beside each other, of which every layer predicts and corrects (AltUp)": """
        gemma3n gemma3n_text""",
    "it makes sound or reads images with parts of its own in the decoder": """
        git moshi musicgen musicgen_melody mllama phi4_multimodal moss_transcribe_diarize emu3""",
    "a norm inside its feed-forward network runs over all channels, so none is independent of the others": """
        bitnet kosmos-2 kosmos-2.5""",
    "its language model, the thinker, is one of several models in it; transformers' class of the thinker alone "
    "(Qwen3OmniMoeThinkerForConditionalGeneration, Qwen2_5OmniThinkerForConditionalGeneration) loads it from the "
    "same folder, and what that saves can be pruned": "qwen2_5_omni qwen3_omni_moe",
    "it takes sound, and nobody has described a model that does": """
        qwen2_audio qwen3_asr voxtral voxtral_realtime granite_speech granite_speech_plus audioflamingo3 musicflamingo
        glmasr fun_asr_nano kyutai_speech_to_text vibevoice_asr""",
    "several streams of hidden states run beside each other, mixed by hyper-connections": """
        deepseek_v4 hy_v4 qwen4_exp qwen4_exp_text glm5_next glm5_next_text""",
    "its keys, values and outputs pass through convolutions, and its router scores shared experts too": """
        inkling_text inkling_mm_model inkling2 inkling2_text""",
    "its attention is a mixture of experts, too": "jetmoe",
    "its router carries a state from layer to layer": "zaya",
    "every layer has two attentions and two FFNs, and some of its experts do nothing": "longcat_flash",
    "its norms have networks of their own, and queries and gates share one matrix": "axk2",
    "the ranks of its latents and the size of its heads depend on the kind of attention of a layer": """
        dots3_note dots3_note_text""",
    "its language model reads images only through the queries of another network, and does not run without": """
        blip-2 instructblip instructblipvideo""",
    "attention to something else than the text stands between its layers, or inside them": "idefics evolla",
    "its experts for text and for images have their widths in one list of the config": """
        ernie4_5_vl_moe ernie4_5_vl_moe_text""",
    "its layers are shared with a network that makes the actions of a robot": "pi0",
    "it writes by diffusion: its layers see the text in both directions": "diffusion_gemma diffusion_gemma_text",
    "its norms of queries and keys have weights of their own for every head": "chameleon",
    "its layers are built in a way of their own": "openai-gpt cpmant ctrl bamba",
    "the bias of its attention's output is a parameter of the attention itself, in the last layer alone": """
        gpt_neox_japanese""",
    "its widths lie in configs inside the config, which cannot differ by layer": "dbrx",
}


REFUSED: dict[str, str] = {family: reason for reason, families in _REASONS.items() for family in families.split()}
"""Families that are refused, and why. What is in neither table, nobody has looked at."""
