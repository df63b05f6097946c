"""Config of a small model of Baichuan's layout, as its repository would bring it; written for the tests."""

from transformers import PreTrainedConfig


class TinyBaichuanConfig(PreTrainedConfig):
    model_type = "tiny_baichuan"

    def __init__(
        self,
        vocab_size=300,
        hidden_size=48,
        intermediate_size=52,
        num_hidden_layers=3,
        num_attention_heads=6,
        hidden_act="silu",
        max_position_embeddings=256,
        initializer_range=0.1,
        rms_norm_eps=1e-6,
        head_dim=None,
        num_experts=0,
        num_experts_per_tok=2,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.head_dim = head_dim
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        super().__init__(**kwargs)
