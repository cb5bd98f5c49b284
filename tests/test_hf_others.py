"""PEFT, TRL and Lightning over sparse models: what they train, save, load and merge."""

import copy

import pytest
import torch
from forms import every_form
from hf_models import IDS, finalized, in_form, llama, sampled
from torch import nn
from training_models import batch, mlp

import sten
from sten.training.engine import engines_of

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def with_lora(model):
    import peft

    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=2))


def train(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(3):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.cell("PEFT")
@every_form
@sampled
def test_lora_on_a_frozen_sparse_base(layout, form, tmp_path):
    """It trains as on the dense numbers; the base stays as it is, in a folder of its own; merging keeps the pattern."""
    peft = pytest.importorskip("peft")
    base = in_form(llama(), layout, form)
    dense = train(with_lora(sten.densify(copy.deepcopy(base))))
    stored = finalized(base).eval()
    model = train(with_lora(base))
    torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-4)

    model.save_pretrained(tmp_path / "adapter")
    stored.save_pretrained(tmp_path / "base")
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(read, tmp_path / "adapter").eval()
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)

    before = {name: t.clone() for name, t in base.state_dict().items()}
    if form == "dense weight":  # the method prunes what was merged
        merged = sten.finalize(model.merge_and_unload())
        w = merged.model.layers[0].mlp.up_proj.weight
        assert w.sparse_layout == layout and w.mask().sum() == stored.model.layers[0].mlp.up_proj.weight.mask().sum()
        return
    with pytest.raises(ValueError, match=r"Expected no non-zeros off the pattern .* or use sten\.densify"):
        model.merge_adapter()
    for name, t in base.state_dict().items():
        assert torch.equal(t.to_dense(), before[name].to_dense()), name
    for name, w in sten.finalize(model.unload()).named_parameters():
        assert torch.equal(w.to_dense(), stored.get_parameter(name).to_dense())


def test_merging_by_way_of_a_dense_model():
    """What the documentation advises: densify, merge, and choose the entries again."""
    pytest.importorskip("peft")
    model = train(with_lora(in_form(llama(), sten.NM(2, 4), "finalized")))
    want = model(IDS).logits
    sten.densify(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, want)
    assert sten.sparsify(merged, sten.NM(2, 4)).model.layers[0].mlp.up_proj.weight.density == 0.5


def same_tokens(layout, form, **more):
    model = in_form(llama(), layout, form).eval()
    dense = finalized(model)
    want = sten.densify(dense).generate(IDS, max_new_tokens=6, do_sample=False, **more)
    assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False, **more), want)


@pytest.mark.cell("generate")
@every_form
@sampled
def test_generate(layout, form):
    same_tokens(layout, form)
    same_tokens(layout, form, num_beams=2)


@pytest.mark.cell("static-cache generate")
@every_form
@sampled
def test_generate_with_a_static_cache(layout, form):
    same_tokens(layout, form, cache_implementation="static")


def words():
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {f"w{i}": i for i in range(30)} | {"<eos>": 30, "<unk>": 31}
    one = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    one.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"eos_token": "<eos>", "pad_token": "<eos>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=one, **special)


@pytest.mark.parametrize("lora", [False, True])
def test_trl(lora, tmp_path):
    """SFTTrainer takes the callback as any Trainer does, and adapters over a sparse model."""
    pytest.importorskip("trl")
    datasets, peft = pytest.importorskip("datasets"), pytest.importorskip("peft")
    from trl import SFTConfig, SFTTrainer

    from sten.integrations.transformers import SparsityCallback

    data = datasets.Dataset.from_list([{"text": " ".join(f"w{i * j % 30}" for j in range(8))} for i in range(16)])
    args = SFTConfig(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to=[], use_cpu=True, bf16=False,
        learning_rate=1e-2, disable_tqdm=True,
    )  # fmt: skip
    model = sten.sparsify(llama(), sten.NM(2, 4)) if lora else llama()
    more = {"callbacks": [SparsityCallback(sten.NM(2, 4), sten.SRSTE())]}
    if lora:
        more = {"peft_config": peft.LoraConfig(target_modules=["up_proj"])}
    before = model.model.layers[0].mlp.up_proj.weight.to_dense().detach().clone()
    trainer = SFTTrainer(model, args, train_dataset=data, processing_class=words(), **more)
    trainer.train()
    if lora:
        w = trainer.model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight
        assert isinstance(w, sten.SparseTensor) and torch.equal(w.to_dense(), before)
    else:
        w = sten.finalize(model).model.layers[0].mlp.up_proj.weight
        assert w.sparse_layout == sten.NM(2, 4) and not torch.equal(w.to_dense(), before)


METHODS = {"trainable": sten.Static(), "dense weight": sten.SRSTE()}


@pytest.mark.cell("Lightning")
@pytest.mark.parametrize("form", METHODS)
@sampled
def test_lightning(layout, form, tmp_path):
    """Two lines more in a LightningModule; a run that is resumed equals one that is not."""
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import ModelCheckpoint

    method = sten.RigL(20, every=2) if layout == sten.FanIn() and form == "trainable" else METHODS[form]

    class Net(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = mlp()
            sten.sparsify(self.net, layout, method, None if layout.rate else 0.5)  # 1

        def training_step(self, data, index):
            return nn.functional.cross_entropy(self.net(data[0]), data[1])

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
            sten.attach(self.net, optimizer)  # 2
            return optimizer

    def fit(folder, **resume):
        data = [tuple(t[0] for t in batch(i, 1)) for i in range(20)]
        every = ModelCheckpoint(dirpath=folder, every_n_train_steps=5, save_top_k=-1, filename="{step}")
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = lightning.Trainer(
            max_steps=10, default_root_dir=folder, accelerator="cpu", callbacks=[every], **quiet
        )
        net = Net()
        trainer.fit(net, torch.utils.data.DataLoader(data, batch_size=4), **resume)
        return net

    straight = fit(tmp_path / "a")
    resumed = fit(tmp_path / "b", ckpt_path=tmp_path / "a" / "step=5.ckpt")
    want, got = straight.state_dict(), resumed.state_dict()
    assert want.keys() == got.keys() and all(torch.equal(t, got[name]) for name, t in want.items())
    assert [engine.step for engine in engines_of(resumed)] == ([] if method.acts_once else [10])


def test_shards_are_refused(tmp_path):
    """Where only one rank asks for the state, gathering would wait for the others."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = in_form(llama(), sten.CSR(), "trainable")
        fully_shard(model)
        with pytest.raises(ValueError, match=r"Expected whole parameters for save_pretrained, got .* in shards; save"):
            model.save_pretrained(tmp_path)
        assert not list(tmp_path.iterdir())
    finally:
        dist.destroy_process_group()
