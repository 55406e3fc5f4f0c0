"""plans.py for a model of which every query head has a KV head of its own: what plans per query head would give."""
import sys
sys.path.insert(0, "examples/bench")
import torch, plans

def expanded(load):
    def run(device, dtype):
        model, tokenizer = load(device, dtype)
        c = model.config
        G, kv, D = c.num_attention_heads // c.num_key_value_heads, c.num_key_value_heads, model.model.layers[0].self_attn.head_dim
        for layer in model.model.layers:
            a = layer.self_attn
            for name in ("k_proj", "v_proj"):
                old = getattr(a, name)
                new = torch.nn.Linear(old.in_features, G * old.out_features, bias=old.bias is not None, device=device, dtype=dtype)
                new.weight.data = old.weight.data.view(kv, D, -1).repeat_interleave(G, 0).flatten(0, 1).contiguous()
                if old.bias is not None: new.bias.data = old.bias.data.view(kv, D).repeat_interleave(G, 0).flatten()
                setattr(a, name, new)
            a.num_key_value_groups = 1
        c.num_key_value_heads = c.num_attention_heads
        return model.eval(), tokenizer
    return run

if "--shared" in sys.argv:
    sys.argv.remove("--shared")
else:
    plans.MODELS = {k: (name + ", per query head", expanded(load)) for k, (name, load) in plans.MODELS.items()}
plans.Bench.few = ("per head", "window or everything")
plans.main()
