"""A small model of Baichuan's layout: queries, keys and values in one `W_pack`. Written for the tests."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_tiny_baichuan import TinyBaichuanConfig


class TinyBaichuanRMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        wide = x.float() if x.dtype != torch.float64 else x
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def rotate(x, positions):
    half = x.shape[-1] // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    angles = (positions[:, None, :, None].double() * frequencies).to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


class TinyBaichuanAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.hidden_size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.head_dim = config.head_dim or self.hidden_size // self.num_heads
        self.layer_idx = layer_idx
        self.W_pack = nn.Linear(self.hidden_size, 3 * self.num_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, self.hidden_size, bias=False)

    def forward(self, hidden_states, position_ids, past_key_values=None):
        batch, length, _ = hidden_states.shape
        packed = self.W_pack(hidden_states).view(batch, length, 3, self.num_heads, self.head_dim)
        queries, keys, values = packed.permute(2, 0, 3, 1, 4)
        queries, keys = rotate(queries, position_ids), rotate(keys, position_ids)
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.layer_idx)
        earlier = keys.shape[2] - length
        mask = torch.ones(length, keys.shape[2], dtype=torch.bool, device=keys.device).tril(earlier)
        output = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return self.o_proj(output.transpose(1, 2).flatten(2))


class TinyBaichuanMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class TinyBaichuanExperts(nn.Module):
    def __init__(self, config):
        super().__init__()
        count, width, hidden = config.num_experts, config.intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(count, hidden, width))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, tokens, index, weights):
        output = torch.zeros_like(tokens)
        for expert in range(len(self.down_proj)):
            rows, slots = (index == expert).nonzero(as_tuple=True)
            gate, up = F.linear(tokens[rows], self.gate_up_proj[expert]).chunk(2, dim=-1)
            result = F.linear(self.act_fn(gate) * up, self.down_proj[expert]) * weights[rows, slots, None]
            output = output.index_add(0, rows, result)
        return output


class TinyBaichuanRouter(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, tokens):
        weights, index = F.linear(tokens, self.weight).softmax(-1).topk(self.top_k)
        return index, weights / weights.sum(-1, keepdim=True)


class TinyBaichuanMixture(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.router = TinyBaichuanRouter(config)
        self.experts = TinyBaichuanExperts(config)

    def forward(self, x):
        tokens = x.flatten(0, 1)
        return self.experts(tokens, *self.router(tokens)).view_as(x)


class TinyBaichuanLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.self_attn = TinyBaichuanAttention(config, layer_idx)
        self.mlp = TinyBaichuanMixture(config) if config.num_experts else TinyBaichuanMLP(config)
        self.input_layernorm = TinyBaichuanRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = TinyBaichuanRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states, position_ids=None, past_key_values=None):
        hidden_states = hidden_states + self.self_attn(
            self.input_layernorm(hidden_states), position_ids, past_key_values
        )
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class TinyBaichuanPreTrainedModel(PreTrainedModel):
    config_class = TinyBaichuanConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, (TinyBaichuanExperts, TinyBaichuanRouter)):
            for parameter in module.parameters(recurse=False):
                nn.init.normal_(parameter, std=self.config.initializer_range)
        elif isinstance(module, TinyBaichuanRMSNorm):
            nn.init.ones_(module.weight)


class TinyBaichuanModel(TinyBaichuanPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([TinyBaichuanLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = TinyBaichuanRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(self, input_ids, past_key_values=None, use_cache=None, **kwargs):
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        earlier = past_key_values.get_seq_length() if past_key_values is not None else 0
        length = input_ids.shape[1]
        position_ids = torch.arange(earlier, earlier + length, device=input_ids.device).expand_as(input_ids)
        hidden_states = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states, position_ids=position_ids, past_key_values=past_key_values)
        return BaseModelOutputWithPast(self.norm(hidden_states), past_key_values=past_key_values)


class TinyBaichuanForCausalLM(TinyBaichuanPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = TinyBaichuanModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=None, **kwargs):
        output = self.model(input_ids, past_key_values=past_key_values, use_cache=use_cache)
        logits = self.lm_head(output.last_hidden_state)
        return CausalLMOutputWithPast(logits=logits, past_key_values=output.past_key_values)
