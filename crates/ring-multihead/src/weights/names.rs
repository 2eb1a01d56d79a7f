//! What the parameters of other libraries are called, and where they belong.

/// Where a tensor of a file belongs in a module. Names of parameters are as PyTorch has them: norms have `weight` and `bias`.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// It is this parameter.
    Parameter(String),
    /// It is the `weight` or `bias` of query, key and value of an attention, one after the other in its rows.
    Fused {
        /// Path of the attention, empty or with a dot at its end.
        attention: String,
        /// Which of both.
        parameter: &'static str,
    },
}

impl Place {
    /// The same place in a module that is part of another.
    fn within(self, path: &str) -> Self {
        match self {
            Self::Parameter(name) => Self::Parameter(format!("{path}.{name}")),
            Self::Fused {
                attention,
                parameter,
            } => Self::Fused {
                attention: format!("{path}.{attention}"),
                parameter,
            },
        }
    }
}

/// Names in an attention, and ours.
const ATTENTION: [(&str, &str); 10] = [
    ("query", "query"),
    ("key", "key"),
    ("value", "value"),
    ("output", "output"),
    ("norm", "norm"),
    ("q_proj", "query"),
    ("k_proj", "key"),
    ("v_proj", "value"),
    ("out_proj", "output"),
    ("inner_attn_ln", "norm"),
];

/// Names in a block beside its attention, and ours.
const BLOCK: [(&str, &str); 17] = [
    ("attention_norm", "attention_norm"),
    ("feed_forward_norm", "feed_forward_norm"),
    ("expand", "expand"),
    ("sub_norm", "sub_norm"),
    ("contract", "contract"),
    ("norm1", "attention_norm"),
    ("norm2", "feed_forward_norm"),
    ("linear1", "expand"),
    ("norm3", "sub_norm"),
    ("linear2", "contract"),
    ("self_attn_layer_norm", "attention_norm"),
    ("final_layer_norm", "feed_forward_norm"),
    ("ffn.fc1", "expand"),
    ("ffn.ffn_layernorm", "sub_norm"),
    ("ffn.fc2", "contract"),
    ("fc1", "expand"),
    ("fc2", "contract"),
];

/// Names in a language model beside its blocks, and ours.
const MODEL: [(&str, &str); 9] = [
    ("embedding", "embedding"),
    ("norm", "norm"),
    ("head", "head"),
    ("token_embedding", "embedding"),
    ("embed_tokens", "embedding"),
    ("layer_norm", "norm"),
    ("out", "head"),
    ("output_projection", "head"),
    ("lm_head", "head"),
];

/// Matrices that are called so here alone: such names do not tell who wrote the file.
const OWN: [&str; 6] = ["query", "key", "value", "output", "expand", "contract"];

/// Whether a name is that of a matrix in this library.
pub(super) fn is_own(name: &str) -> bool {
    let mut parts = name.rsplit('.');
    parts.next() == Some("weight") && parts.next().is_some_and(|part| OWN.contains(&part))
}

/// The place of a name in a module of some kind.
pub(super) type Grammar = fn(&str) -> Option<Place>;

/// A name in an attention.
pub(super) fn attention(name: &str) -> Option<Place> {
    let parameter = match name {
        "qkv_proj.weight" | "in_proj_weight" => "weight",
        "qkv_proj.bias" | "in_proj_bias" => "bias",
        _ => return known(&ATTENTION, name),
    };
    Some(Place::Fused {
        attention: String::new(),
        parameter,
    })
}

/// A name in a block.
pub(super) fn block(name: &str) -> Option<Place> {
    let in_attention = ["self_attn.", "attention."]
        .iter()
        .find_map(|path| name.strip_prefix(path));
    match in_attention {
        Some(rest) => Some(attention(rest)?.within("attention")),
        None => known(&BLOCK, name),
    }
}

/// A name in a stack of blocks.
pub(super) fn blocks(name: &str) -> Option<Place> {
    let rest = LAYERS
        .iter()
        .find_map(|path| name.strip_prefix(path))
        .unwrap_or(name);
    let (index, rest) = rest.split_once('.')?;
    let index: usize = index.parse().ok()?;
    Some(block(rest)?.within(&index.to_string()))
}

/// What stands before the number of a layer.
const LAYERS: [&str; 3] = ["encoder.layers.", "layers.", "blocks."];

/// A name in a language model.
pub(super) fn model(name: &str) -> Option<Place> {
    match known(&MODEL, name) {
        Some(place) => Some(place),
        None if LAYERS.iter().any(|path| name.starts_with(path)) => {
            Some(blocks(name)?.within("blocks"))
        }
        None => None,
    }
}

/// A parameter of a module that a table names.
fn known(table: &[(&str, &str)], name: &str) -> Option<Place> {
    let (module, parameter) = name.rsplit_once('.')?;
    let (_, own) = table.iter().find(|(theirs, _)| *theirs == module)?;
    let parameter = match parameter {
        "weight" | "gamma" => "weight",
        "bias" | "beta" => "bias",
        _ => return None,
    };
    Some(Place::Parameter(format!("{own}.{parameter}")))
}

/// What training wraps around a whole model; a top-level key of a file counts as one.
const WRAPPERS: [&str; 5] = [
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "decoder",
];

/// What it puts anywhere between.
const TRANSPARENT: [&str; 3] = [
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
];

/// Top-level keys of what an optimizer keeps.
const OPTIMIZER: [&str; 4] = [
    "optimizer",
    "optimizer_state_dict",
    "optimizer_states",
    "optim",
];

/// Whether a tensor belongs to an optimizer.
pub(super) fn is_optimizer(name: &str) -> bool {
    name.split_once('.')
        .is_some_and(|(first, _)| OPTIMIZER.contains(&first))
}

/// Takes off what was wrapped around the model, as far as all names have it.
pub(super) fn unwrap(names: &mut [String]) {
    for name in names.iter_mut() {
        let parts = name.split('.').filter(|part| !TRANSPARENT.contains(part));
        *name = parts.collect::<Vec<_>>().join(".");
    }
    while let Some(wrapper) = names.first().and_then(|name| common_wrapper(name, names)) {
        for name in names.iter_mut() {
            *name = name[wrapper.len() + 1..].to_string();
        }
    }
}

/// The wrapper that a name begins with, if all others do too.
fn common_wrapper(name: &str, names: &[String]) -> Option<&'static str> {
    let (first, _) = name.split_once('.')?;
    let wrapper = WRAPPERS.into_iter().find(|wrapper| *wrapper == first)?;
    let has = |name: &String| {
        name.split_once('.')
            .is_some_and(|(part, _)| part == wrapper)
    };
    names.iter().all(has).then_some(wrapper)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_as_a_whole() {
        let parameter = |name: &str| Some(Place::Parameter(name.into()));
        assert_eq!(attention("q_proj.weight"), parameter("query.weight"));
        assert_eq!(attention("norm.gamma"), parameter("norm.weight"));
        assert_eq!(model("norm.weight"), parameter("norm.weight"));
        assert_eq!(model("out.bias"), parameter("head.bias"));
        assert_eq!(
            model("layers.11.self_attn.inner_attn_ln.bias"),
            parameter("blocks.11.attention.norm.bias")
        );
        assert_eq!(blocks("3.ffn.fc2.weight"), parameter("3.contract.weight"));
        assert_eq!(
            model("encoder.layers.0.self_attn.in_proj_bias"),
            Some(Place::Fused {
                attention: "blocks.0.attention.".into(),
                parameter: "bias"
            })
        );
        for unknown in [
            "out_proj.weight",
            "layers.x.norm1.weight",
            "layers.0.norm1",
            "layers.0.norm12.weight",
            "decoder.layers.0.norm1.weight",
            "0.norm1.weight",
            "norm.running_mean",
        ] {
            assert_eq!(model(unknown), None, "{unknown}");
        }
    }

    #[test]
    fn wrappers_come_off_where_all_names_have_them() {
        let unwrapped = |names: &[&str]| {
            let mut names: Vec<String> = names.iter().map(ToString::to_string).collect();
            unwrap(&mut names);
            names
        };
        let wrapped = [
            "model.module.decoder.layers.0._orig_mod.norm1.weight",
            "model.module.decoder.norm.weight",
        ];
        assert_eq!(
            unwrapped(&wrapped),
            ["layers.0.norm1.weight", "norm.weight"]
        );
        let both = ["encoder.norm.weight", "decoder.norm.weight"];
        assert_eq!(unwrapped(&both), both);
        assert_eq!(unwrapped(&["model"]), ["model"]);
    }
}
