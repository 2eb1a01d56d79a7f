//! Weights made by PyTorch, loaded: the numbers are PyTorch's, and what does not fit is said.
//!
//! `make.py` beside this file has written the files, and computed what is expected.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use burn::{
    module::Module,
    tensor::{DType, Device, Tensor, TensorData},
};
use burn_store::{BurnToPyTorchAdapter, ModuleSnapshot, SafetensorsStore};
use ring_burn::{
    Communicator, HeadOffsets, HostBuffer, Loopback, Mixing, Ring, Sharding, shard_tensor,
};
use ring_multihead::{
    LongNetBlock, LongNetBlockConfig, LongNetConfig, MultiheadDilatedAttention,
    MultiheadDilatedAttentionConfig, Weights, WeightsError, weights::Layout,
};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

fn file(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    folder.join("tests/weights").join(name)
}

fn weights(name: &str) -> Weights {
    Weights::from_file(file(name)).unwrap()
}

/// A tensor of the file with what is expected.
fn stored<const D: usize>(name: &str) -> Tensor<D> {
    let bytes = std::fs::read(file("expected.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = tensors.tensor(name).unwrap();
    let data = TensorData::from_bytes_vec(tensor.data().to_vec(), tensor.shape(), DType::F32);
    Tensor::from_data(data, &Device::flex())
}

/// Whether what the ranks make of their shards of `input` are shards of `output`, on one rank and on three.
fn assert_agrees<const D: usize>(
    input: &str,
    output: &str,
    forward: impl Fn(Tensor<D>, &Ring) -> Tensor<3> + Sync,
) {
    let (input, expected) = (stored::<D>(input), stored::<3>(output));
    let length = expected.dims()[1];
    let largest: f32 = expected.clone().abs().max().into_scalar();
    for ranks in [1, 3] {
        let differences = Loopback::run::<HostBuffer, _>(ranks, Duration::from_secs(60), |end| {
            let communicator = Communicator::new(Arc::new(end));
            let ring = Ring::new(communicator, Sharding::Zigzag, length).unwrap();
            let own = forward(shard_tensor(input.clone(), 1, &ring).unwrap(), &ring);
            let expected = shard_tensor(expected.clone(), 1, &ring).unwrap();
            (own - expected).abs().max().into_scalar::<f32>()
        });
        for difference in differences {
            let difference = difference.unwrap();
            assert!(
                difference <= 2e-5,
                "{output} on {ranks} ranks: off by {difference}, numbers are up to {largest}"
            );
        }
    }
}

fn config() -> MultiheadDilatedAttentionConfig {
    MultiheadDilatedAttentionConfig::new(32, 4, vec![16, 48], vec![1, 2]).with_causal(true)
}

fn full() -> MultiheadDilatedAttentionConfig {
    MultiheadDilatedAttentionConfig::new(32, 4, vec![], vec![]).with_causal(true)
}

fn attention(config: &MultiheadDilatedAttentionConfig) -> MultiheadDilatedAttention {
    config.init(&Device::flex())
}

fn block(config: &MultiheadDilatedAttentionConfig) -> LongNetBlock {
    let config = LongNetBlockConfig::new(config.clone(), 40);
    config.try_init(&Device::flex()).unwrap()
}

fn blocks(config: &MultiheadDilatedAttentionConfig) -> Vec<LongNetBlock> {
    vec![block(config), block(config)]
}

fn stacked(blocks: &[LongNetBlock], input: Tensor<3>, ring: &Ring) -> Tensor<3> {
    blocks.iter().fold(input, |hidden, block| {
        block.try_forward(hidden, None, ring).unwrap()
    })
}

#[test]
fn attention_of_every_layout() {
    let grouped = config()
        .with_num_kv_heads(Some(2))
        .with_bias(false)
        .with_scale(Some(0.5));
    for (name, ending, config) in [
        ("projections", "pt", config().with_sub_layer_norm(true)),
        ("fused", "pt", config().with_mixing(Mixing::HeadGroups)),
        ("in_proj", "safetensors", full()),
        ("grouped", "safetensors", grouped),
    ] {
        let mut attention = attention(&config);
        let weights = weights(&format!("{name}.{ending}"));
        let unused = weights.load_attention(&mut attention).unwrap();
        assert!(unused.is_empty(), "{unused:?}");
        assert_eq!(attention.key.weight.val().dtype(), DType::F32);
        assert_agrees("input", name, |input, ring| attention.forward(input, ring));
    }
}

#[test]
fn a_layer_of_pytorch_is_a_block() {
    let mut block = block(&full().with_layer_norm_eps(0.01));
    weights("layer.pt").load_block(&mut block).unwrap();
    assert_agrees("input", "layer", |input, ring| {
        block.try_forward(input, None, ring).unwrap()
    });
}

#[test]
fn stacks_of_blocks() {
    let with_norms = config().with_sub_layer_norm(true);
    let mut encoder = blocks(&with_norms.clone().with_mixing(Mixing::HeadGroups));
    let chosen = weights("encoder.pt").with_prefix("encoder.layers");
    assert!(chosen.load_blocks(&mut encoder).unwrap().is_empty());
    assert_agrees("input", "encoder", |x, ring| stacked(&encoder, x, ring));

    let mut decoder = blocks(&with_norms.with_offsets(HeadOffsets::Blocked));
    let all = weights("decoder.safetensors").allow_unused(true);
    let unused = all.load_blocks(&mut decoder).unwrap();
    assert_eq!(
        unused,
        [
            "decoder.embed_tokens.weight",
            "decoder.layer_norm.bias",
            "decoder.layer_norm.weight",
            "decoder.output_projection.weight"
        ]
    );
    assert_agrees("input", "decoder.blocks", |x, ring| {
        stacked(&decoder, x, ring)
    });
}

fn model() -> LongNetConfig {
    LongNetConfig::new(vec![16, 48], vec![1, 2])
        .with_vocab_size(16)
        .with_embed_dim(32)
        .with_num_layers(2)
        .with_feed_forward_dim(Some(40))
        .with_sub_layer_norm(true)
}

#[test]
fn a_whole_model_whose_head_has_no_bias() {
    let mut model = model().try_init(&Device::flex()).unwrap();
    weights("decoder.safetensors")
        .load_model(&mut model)
        .unwrap();
    assert_agrees::<2>("tokens", "decoder", |tokens, ring| {
        model.forward(tokens.int(), ring)
    });
}

#[test]
fn what_is_trained_stays_trained() {
    let device = Device::flex().autodiff();
    let mut attention = config().with_sub_layer_norm(true).init(&device);
    weights("projections.pt")
        .load_attention(&mut attention)
        .unwrap();
    let ring = Ring::single(48).unwrap();
    let input = stored::<3>("input").to_device(&device);
    let gradients = attention.forward(input, &ring).sum().backward();
    assert!(attention.query.weight.grad(&gradients).is_some());
    assert!(attention.norm.unwrap().gamma.grad(&gradients).is_some());
}

/// Every parameter of a module by name.
fn parameters<M: ModuleSnapshot>(module: &M) -> BTreeMap<String, Vec<u8>> {
    let tensors = module.collect(None, None, true).into_iter();
    tensors
        .map(|tensor| (tensor.name.clone(), tensor.into_bytes().unwrap().to_vec()))
        .collect()
}

/// The error of a load that fails, after checking that it changed nothing.
fn refused<M: ModuleSnapshot>(
    module: &mut M,
    load: impl Fn(&mut M) -> Result<Vec<String>, WeightsError>,
) -> WeightsError {
    let before = parameters(module);
    let error = load(module).unwrap_err();
    assert!(before == parameters(module), "changed, in spite of {error}");
    error
}

#[test]
fn what_is_too_much_or_missing_is_named() {
    let plain = &mut attention(&config());
    let error = refused(plain, |it| weights("projections.pt").load_attention(it));
    assert!(
        matches!(&error, WeightsError::Unused { names } if names == &["norm.bias", "norm.weight"]),
        "{error}"
    );
    assert!(error.to_string().contains("sub_layer_norm"), "{error}");

    let error = refused(plain, |it| {
        weights("grouped.safetensors").load_attention(it)
    });
    assert!(matches!(error, WeightsError::Shape { .. }), "{error}");
    let grouped = &mut attention(&config().with_num_kv_heads(Some(2)));
    let error = refused(grouped, |it| {
        weights("grouped.safetensors").load_attention(it)
    });
    let biases = ["key.bias", "output.bias", "query.bias", "value.bias"];
    assert!(
        matches!(&error, WeightsError::Missing { parameters, .. } if *parameters == biases),
        "{error}"
    );

    let with_norms = config().with_sub_layer_norm(true);
    let stack = &mut blocks(&with_norms);
    let error = refused(stack, |it| weights("encoder.pt").load_blocks(it));
    assert!(
        matches!(&error, WeightsError::Unused { names } if names == &["decoder.layers.0.norm1.weight"]),
        "{error}"
    );
    assert!(error.to_string().contains("cross-attention"), "{error}");
    stack.push(block(&with_norms));
    let error = refused(stack, |it| weights("decoder.safetensors").load_blocks(it));
    assert!(
        matches!(&error, WeightsError::Missing { parameters, .. }
            if parameters.len() == 20 && parameters.iter().all(|name| name.starts_with("2."))),
        "{error}"
    );
}

/// A file of zeros: the matrices of an attention and others, of four bytes an element.
fn written(folder: &Path, others: &[(&str, &[usize], Dtype)]) -> Weights {
    let parts = ["q_proj", "k_proj", "v_proj", "out_proj"];
    let names: Vec<String> = parts.map(|part| format!("{part}.weight")).into();
    let matrices = names
        .iter()
        .map(|name| (name.as_str(), &[32, 32][..], Dtype::F32));
    let zeros = vec![0; 4 * 96 * 32];
    let views = matrices
        .chain(others.iter().copied())
        .map(|(name, shape, dtype)| {
            let size = shape.iter().product::<usize>() * 4;
            let view = TensorView::new(dtype, shape.to_vec(), &zeros[..size]);
            (name, view.unwrap())
        });
    let path = folder.join("zeros.safetensors");
    // Where a name comes twice the last one counts.
    let views: BTreeMap<&str, TensorView> = views.collect();
    safetensors::serialize_to_file(views, None, &path).unwrap();
    Weights::from_file(path).unwrap()
}

#[test]
fn tensors_that_would_be_dropped_or_misunderstood() {
    let folder = tempfile::tempdir().unwrap();
    let module = &mut attention(&config().with_bias(false));
    for name in ["q_ln.weight", "k_norm.bias", "gamma_q"] {
        let weights = written(folder.path(), &[(name, &[32], Dtype::F32)]);
        let error = refused(module, |it| weights.load_attention(it));
        assert!(
            matches!(&error, WeightsError::Unused { names } if names == &[name]),
            "{error}"
        );
        assert!(error.to_string().contains("norms of queries"), "{error}");
        let left = weights.allow_unused(true).load_attention(module).unwrap();
        assert_eq!(left, [name]);
    }
    let twice = written(folder.path(), &[("in_proj_weight", &[96, 32], Dtype::F32)]);
    let error = refused(module, |it| twice.load_attention(it));
    assert!(matches!(error, WeightsError::Ambiguous { .. }), "{error}");
    let whole = written(folder.path(), &[("k_proj.weight", &[32, 32], Dtype::I32)]);
    let error = refused(module, |it| whole.load_attention(it));
    assert!(
        matches!(&error, WeightsError::Type { name, .. } if name == "k_proj.weight"),
        "{error}"
    );
}

#[test]
fn shapes_are_told_as_the_file_has_them() {
    let grouped = &mut attention(&config().with_num_kv_heads(Some(2)));
    for (name, wrong, got, expected) in [
        ("fused.pt", "model.module.qkv_proj.bias", vec![96], vec![64]),
        ("in_proj.safetensors", "in_proj_bias", vec![96], vec![64]),
        ("projections.pt", "k_proj.bias", vec![32], vec![16]),
    ] {
        let chosen = weights(name).allow_unused(true);
        let error = refused(grouped, |it| chosen.load_attention(it));
        assert!(
            matches!(&error, WeightsError::Shape { name, got: found, expected: needed, .. }
                if name == wrong && *found == got && *needed == expected),
            "{error}"
        );
    }
    let wide = LongNetBlockConfig::new(full(), 48);
    let wide = &mut wide.try_init(&Device::flex()).unwrap();
    let error = refused(wide, |it| weights("layer.pt").load_block(it)).to_string();
    assert_eq!(
        error,
        "\"linear2.weight\" has shape [32, 40], contract.weight needs [32, 48]"
    );
}

#[test]
fn files_that_are_none_and_parts_that_are_not_there() {
    let folder = tempfile::tempdir().unwrap();
    let other = folder.path().join("weights.onnx");
    let error = Weights::from_file(&other).unwrap_err();
    assert!(matches!(error, WeightsError::UnknownFormat { .. }));
    for ending in ["pt", "safetensors"] {
        let path = folder.path().join("weights").with_extension(ending);
        assert!(matches!(
            Weights::from_file(&path).unwrap_err(),
            WeightsError::File { .. }
        ));
        std::fs::write(&path, "no tensors").unwrap();
        let error = Weights::from_file(&path).unwrap_err();
        assert!(matches!(error, WeightsError::File { .. }), "{error}");
    }
    let names = [
        "in_proj_bias",
        "in_proj_weight",
        "out_proj.bias",
        "out_proj.weight",
    ];
    assert!(weights("in_proj.safetensors").names().eq(names));
    let chosen = weights("fused.pt").with_prefix("ema");
    let error = refused(&mut attention(&config()), |it| chosen.load_attention(it));
    assert!(
        matches!(&error, WeightsError::Prefix { beginnings, .. } if beginnings == &["model", "optimizer"]),
        "{error}"
    );
}

#[test]
fn data_that_cannot_be_read_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bad.pt");
    let mut bytes = std::fs::read(file("projections.pt")).unwrap();
    // Somewhere in the numbers of the second half: their check sum is wrong then, and the names are still right.
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let bad = Weights::from_file(&path).unwrap();
    let module = &mut attention(&config().with_sub_layer_norm(true));
    let error = refused(module, |it| bad.load_attention(it));
    assert!(matches!(error, WeightsError::Data { .. }), "{error}");
}

#[test]
fn names_of_this_library_need_a_layout() {
    let folder = tempfile::tempdir().unwrap();
    let device = Device::flex();
    let saved = model().try_init(&device).unwrap().materialize();
    for layout in [Layout::Burn, Layout::PyTorch] {
        let path = folder.path().join(format!("{layout:?}.safetensors"));
        let store = SafetensorsStore::from_file(&path);
        let mut store = match layout {
            Layout::Burn => store,
            Layout::PyTorch => store.with_to_adapter(BurnToPyTorchAdapter),
        };
        saved.save_into(&mut store).unwrap();
        let mut loaded = model().try_init(&device).unwrap();
        let chosen = Weights::from_file(&path).unwrap();
        let error = refused(&mut loaded, |it| chosen.load_model(it));
        assert!(matches!(error, WeightsError::UnknownLayout { .. }));
        let chosen = chosen.with_layout(layout);
        assert!(chosen.load_model(&mut loaded).unwrap().is_empty());
        assert_eq!(parameters(&loaded), parameters(&saved));
    }
}
