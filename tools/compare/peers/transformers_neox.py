"""A Transformer of the same size: GPT-NeoX (Pythia's shapes) in Hugging Face transformers, sdpa, bf16. It is
measured in the paper's protocol alone: prompt, then generation, the whole call timed."""

from peers.transformers_mamba import TransformersMamba


class TransformersNeox(TransformersMamba):
    def model(self, name):
        import torch
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

        from shapes import SHAPES
        shape = SHAPES[name]
        if not shape.neox:
            raise RuntimeError(f"no GPT-NeoX has the size of {name}")
        n_layer, n_head = shape.neox
        torch.manual_seed(0)
        config = GPTNeoXConfig(hidden_size=shape.d_model, num_hidden_layers=n_layer,
                               num_attention_heads=n_head, intermediate_size=4 * shape.d_model,
                               vocab_size=50304, max_position_embeddings=4096,
                               attn_implementation="sdpa")
        return self.random_model(GPTNeoXForCausalLM, config)
