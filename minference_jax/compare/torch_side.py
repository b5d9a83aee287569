"""The PyTorch side of a comparison: a script for an interpreter of its own.

    python -P torch_side.py REQUEST.json

That interpreter has torch, transformers and safetensors, and often not jax or this package: it imports neither.
The request is
`{"threads": int | null, "jobs": [...]}`, each job one of

- `{"kind": "create", "model": DIR, "config": {...}, "seed": int, "max_shard_size": str, "keep_config": bool}` writes a
  model directory with random weights; with `keep_config` its config.json is the one given, as a checkpoint written
  by an older transformers has it, instead of what this transformers would write;
- `{"kind": "run", "model": DIR, "output": DIR, "dtype": "float32" | "bfloat16" | "float16",
  "attention": "sdpa" | "eager", "device": "cpu" | "cuda", "positions": [int, ...], "layers": bool,
  "new_tokens": int, "chunk": int}`
  runs `tokens.npy` (int [b, t]) of `output`, of which `lengths.npy` (int [b]) are valid, and writes the arrays that
  outputs.py describes.

Rows of a batch run one at a time and without padding: that is what a user of the Hugging Face model gets for each
prompt, and what a padded batch of ours has to reproduce. Lines of standard output that begin with "progress " are
news for the user. A failure ends with a traceback on standard error and exit status 1.
"""

# pyright: reportMissingImports=false
import json
import sys
import time
from pathlib import Path


def progress(message):
    print(f"progress {message}", flush=True)


def open_arrays(directory, batch, t, levels, positions, width, vocabulary, new_tokens):
    """Creates the .npy files of a run and maps them for writing: name -> array, without those that would be empty.

    The JAX side calls this too, so this file alone says what the arrays are; outputs.py says what they mean.
    """
    import numpy as np

    shapes = {
        "hidden": (np.float32, (batch, levels, positions, width)),
        "logits": (np.float32, (batch, positions, vocabulary)),
        "argmax": (np.int32, (batch, t)),
        "margin": (np.float32, (batch, t)),
        "logsumexp": (np.float32, (batch, t)),
        "next_logit": (np.float32, (batch, t)),
        "greedy": (np.int32, (batch, new_tokens)),
    }
    return {
        name: np.lib.format.open_memmap(directory / f"{name}.npy", "w+", np.dtype(dtype), shape)
        for name, (dtype, shape) in shapes.items()
        if 0 not in shape
    }


def create_model(job):
    """Writes a Hugging Face directory with random weights that exercise every parameter.

    A fresh transformers model has norm weights of one and biases of zero, and weights so small that attention is
    flat: it could not tell a wrong norm, bias or rotation from a right one. So every parameter is drawn anew, at a
    scale that keeps activations near one.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    fields = {name: value for name, value in job["config"].items() if name != "model_type"}
    config = CONFIG_MAPPING[job["config"]["model_type"]](**fields)
    model = AutoModelForCausalLM.from_config(config).float()
    generator = torch.Generator().manual_seed(job["seed"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.2 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
    model.save_pretrained(job["model"], max_shard_size=job["max_shard_size"])
    if job["keep_config"]:
        (Path(job["model"]) / "config.json").write_text(json.dumps(job["config"], indent=2))


def load_model(job):
    """The model, on its device and in its dtype; a checkpoint with missing or left-over tensors is an error."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if job["device"] == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: device 'cuda' was asked for, but this torch sees no CUDA device")
    options = {"local_files_only": True, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(job["model"], **options)
    # Attention sinks are in no implementation but "eager".
    has_sinks = config.model_type == "gpt_oss"
    model, info = AutoModelForCausalLM.from_pretrained(
        job["model"],
        dtype=getattr(torch, job["dtype"]),
        attn_implementation="eager" if has_sinks else job["attention"],
        use_safetensors=True,
        output_loading_info=True,
        **options,
    )
    # transformers fills a missing tensor with random numbers and goes on.
    wrong = {name: sorted(map(str, info.get(name) or ())) for name in ("missing_keys", "unexpected_keys")}
    if any(wrong.values()):
        raise SystemExit(f"error: {job['model']} does not match its config: {wrong}")
    return model.to(job["device"]).eval()


def reset_rope(model):
    """Forgets the longest sequence so far: dynamic NTK scaling keeps its frequencies until a short sequence comes."""
    import torch

    core = text_model(model)
    if "dynamic" in str(getattr(core.rotary_emb, "rope_type", "")):
        core(torch.zeros((1, 1), dtype=torch.long, device=model.device), use_cache=False)


def text_model(model):
    """The layers of the text model, which a model of pictures and text holds beside others."""
    return getattr(model.model, "language_model", model.model)


def head(model, hidden):
    """Logits of rows, float32, as the model's own class makes them after its head."""
    config = model.config.get_text_config()
    logits = model.lm_head(hidden) / (getattr(config, "logits_scaling", None) or 1)
    cap = getattr(config, "final_logit_softcapping", None)
    return (logits if cap is None else cap * (logits / cap).tanh()).float()


def run_row(model, tokens, positions, chunk, new_tokens, write):
    """One unpadded sequence `tokens` (a 1-D tensor): hands each result to `write(array, index, values)`."""
    import torch

    core, length = text_model(model), len(tokens)
    kept = [i for i, p in enumerate(positions) if p < length]
    rows = torch.tensor([positions[i] for i in kept], device=tokens.device)

    def keep_hidden(level):
        def hook(_module, _inputs, output):
            hidden = output[0] if isinstance(output, tuple) else output
            write("hidden", (level, kept), hidden[0, rows])

        return hook

    modules = [*core.layers, core.norm]
    hooks = [module.register_forward_hook(keep_hidden(level)) for level, module in enumerate(modules, 1)]
    # What the first layer reads, not what the embedding gives: some models scale it between the two.
    hooks.append(
        core.layers[0].register_forward_pre_hook(lambda _module, inputs: write("hidden", (0, kept), inputs[0][0, rows]))
    )
    started = time.perf_counter()
    outputs = core(tokens[None], use_cache=new_tokens > 0)
    prefill = time.perf_counter() - started
    for hook in hooks:
        hook.remove()

    # Logits in chunks of positions: 8,192 positions of a 49,152-word vocabulary are 1.6 GB in float32.
    hidden, wanted = outputs.last_hidden_state[0], {positions[i]: i for i in kept}
    for start in range(0, length, chunk):
        logits = head(model, hidden[start : start + chunk])
        stop = start + len(logits)
        best = logits.topk(2)
        following = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        following[: length - 1 - start] = tokens[start + 1 : stop + 1]
        write("argmax", slice(start, stop), best.indices[:, 0])
        write("margin", slice(start, stop), best.values[:, 0] - best.values[:, 1])
        write("logsumexp", slice(start, stop), logits.logsumexp(-1))
        write("next_logit", slice(start, stop), logits.gather(1, following[:, None])[:, 0])
        inside = [p for p in range(start, stop) if p in wanted]
        if inside:
            write("logits", [wanted[p] for p in inside], logits[[p - start for p in inside]])

    started = time.perf_counter()
    token = head(model, hidden[-1:]).argmax(-1)
    for step in range(new_tokens):
        write("greedy", step, token[0])
        if step + 1 < new_tokens:
            outputs = core(token[None], past_key_values=outputs.past_key_values, use_cache=True)
            token = head(model, outputs.last_hidden_state[0, -1:]).argmax(-1)
    return prefill, time.perf_counter() - started


def run_model(job):
    """Runs one job and writes its arrays and result.json into the output directory."""
    import numpy as np
    import torch

    output = Path(job["output"])
    tokens, lengths = np.load(output / "tokens.npy"), np.load(output / "lengths.npy")
    started = time.perf_counter()
    model = load_model(job)
    seconds = {"load": time.perf_counter() - started, "prefill": 0.0, "decode": 0.0}
    (batch, t), config, positions = tokens.shape, model.config.get_text_config(), job["positions"]
    levels, width, vocabulary = (
        (len(text_model(model).layers) + 2) * job["layers"],
        config.hidden_size,
        model.lm_head.weight.shape[0],
    )
    arrays = open_arrays(output, batch, t, levels, len(positions), width, vocabulary, job["new_tokens"])
    with torch.inference_mode():
        for row in range(batch):

            def write(name, index, values, row=row):
                if name in arrays:
                    # NumPy has no bfloat16.
                    arrays[name][row][index] = (values.float() if values.is_floating_point() else values).cpu().numpy()

            reset_rope(model)
            ids = torch.as_tensor(tokens[row, : lengths[row]].astype(np.int64), device=job["device"])
            progress(f"PyTorch: row {row + 1} of {batch}, {len(ids)} tokens, {job['dtype']}")
            prefill, decode = run_row(model, ids, positions, job["chunk"], job["new_tokens"], write)
            seconds["prefill"] += prefill
            seconds["decode"] += decode
    for array in arrays.values():
        array.flush()
    (output / "result.json").write_text(json.dumps({"seconds": seconds}))


def main(path):
    request = json.loads(Path(path).read_text())
    import torch
    import transformers

    if request["threads"]:
        torch.set_num_threads(request["threads"])
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    progress(f"PyTorch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads")
    kinds = {"create": create_model, "run": run_model}
    for number, job in enumerate(request["jobs"], 1):
        progress(f"PyTorch: job {number} of {len(request['jobs'])}: {job['kind']} {Path(job['model']).name}")
        kinds[job["kind"]](job)
    done = {"torch": str(torch.__version__), "transformers": transformers.__version__, "python": sys.version.split()[0]}
    Path(path).with_suffix(".done.json").write_text(json.dumps(done))


if __name__ == "__main__":
    main(sys.argv[1])
