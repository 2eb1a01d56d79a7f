//! What [`MemoryEstimate`](ring_core::MemoryEstimate) says of a rank, its inputs included, is within a tenth of what the rank holds at
//! one time.

use ring_benches::{
    heap::CountingAllocator,
    memory::{Total, measure_totals},
};
use ring_comm::buffer::DType;
use ring_core::{AttentionSpec, Documents, Pattern, Shape, Sharding};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

const STRIPED: Sharding = Sharding::Striped { chunk_size: None };

/// A computation: who computes what, of which shape.
struct Case {
    pattern: Pattern,
    sharding: Sharding,
    ranks: usize,
    length: usize,
    dtype: DType,
    /// Batch entries, query heads, key/value heads.
    shape: (usize, usize, usize),
    threads: usize,
    documents: Option<Documents>,
}

impl Case {
    fn new(pattern: Pattern, sharding: Sharding, ranks: usize, length: usize) -> Self {
        Self {
            pattern,
            sharding,
            ranks,
            length,
            dtype: DType::F32,
            shape: (1, 4, 4),
            threads: 1,
            documents: None,
        }
    }

    fn bf16(mut self) -> Self {
        self.dtype = DType::BF16;
        self
    }

    fn shape(mut self, batch: usize, query_heads: usize, kv_heads: usize) -> Self {
        self.shape = (batch, query_heads, kv_heads);
        self
    }

    fn threads(mut self, threads: usize) -> Self {
        self.threads = threads;
        self
    }

    fn documents(mut self, documents: Documents) -> Self {
        self.documents = Some(documents);
        self
    }

    fn spec(&self) -> AttentionSpec {
        let (batch, query_heads, kv_heads) = self.shape;
        let shape = Shape {
            batch,
            query_heads,
            kv_heads,
            head_dim: 64,
        };
        let spec = AttentionSpec::new(self.pattern.clone(), shape, self.length)
            .and_then(|spec| spec.sharded(self.sharding, self.ranks))
            .unwrap()
            .with_dtype(self.dtype);
        match &self.documents {
            Some(documents) => spec.with_documents(documents.clone()).unwrap(),
            None => spec,
        }
    }

    fn name(&self) -> String {
        let (batch, query_heads, kv_heads) = self.shape;
        let documents = self.documents.as_ref().map_or("", |_| ", documents");
        format!(
            "{}{documents} | {} | {} | {} | {} | {batch} | {query_heads}/{kv_heads} | {}",
            self.pattern, self.sharding, self.ranks, self.length, self.dtype, self.threads
        )
    }
}

fn cases() -> Vec<Case> {
    use Sharding::{Contiguous, Zigzag};
    let full = || Pattern::full().causal();
    let longnet =
        |shortest| Pattern::dilated(&[shortest, 4 * shortest, 16 * shortest], &[1, 2, 4]).unwrap();
    let window = |left| Pattern::full().causal().with_window(Some(left), None);
    let packed = |length: usize| Documents::new(vec![length / 8, length / 2, length * 3 / 8]);
    let packed_otherwise = Documents::per_entry(vec![vec![1000, 3096], vec![3000, 1096]]);
    vec![
        Case::new(full(), Contiguous, 1, 2048),
        Case::new(full(), Contiguous, 1, 2048)
            .bf16()
            .shape(1, 8, 2)
            .threads(2),
        Case::new(full(), Zigzag, 2, 4096).threads(2),
        Case::new(full(), Contiguous, 3, 3072).shape(2, 4, 2),
        Case::new(full(), Zigzag, 3, 3072).bf16().shape(2, 4, 4),
        Case::new(longnet(256).causal(), Contiguous, 2, 4096).bf16(),
        Case::new(longnet(512), Contiguous, 4, 8192).shape(1, 8, 4),
        Case::new(longnet(256).causal(), Zigzag, 5, 5000).threads(2),
        Case::new(longnet(512).causal(), Contiguous, 8, 8192).bf16(),
        Case::new(longnet(512), STRIPED, 8, 8192),
        Case::new(window(1000), Contiguous, 4, 4096).shape(2, 4, 4),
        Case::new(window(700), Zigzag, 6, 6144)
            .bf16()
            .shape(1, 8, 8),
        Case::new(window(1500), Contiguous, 8, 8192)
            .shape(1, 8, 2)
            .threads(2),
        Case::new(full(), Contiguous, 4, 4096)
            .bf16()
            .documents(packed(4096)),
        Case::new(full(), Zigzag, 7, 7000).documents(packed(7000)),
        Case::new(full(), Contiguous, 4, 4096)
            .shape(2, 4, 4)
            .documents(packed_otherwise),
    ]
}

/// The ratios furthest below and above 1 of all ranks.
fn extremes(totals: &[[Total; 2]], pass: usize) -> (f64, f64) {
    let ratios = totals.iter().map(|total| total[pass].ratio());
    ratios.fold((f64::MAX, 0.0), |(least, most), ratio| {
        (least.min(ratio), most.max(ratio))
    })
}

#[test]
fn estimates_are_within_a_tenth_of_what_is_measured() {
    let mut wrong = Vec::new();
    println!(
        "| pattern | sharding | P | N | type | batch | heads | threads | forward MiB | estimate / measured | backward MiB | estimate / measured |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|---|");
    for case in cases() {
        let totals = measure_totals(&case.spec(), case.threads);
        let mut line = case.name();
        for pass in [0, 1] {
            let (least, most) = extremes(&totals, pass);
            let measured = totals.iter().map(|total| total[pass].measured).max();
            let mib = measured.unwrap() as f64 / f64::from(1 << 20);
            line += &format!(" | {mib:.2} | {least:.3} to {most:.3}");
            if least < 0.9 || most > 1.1 {
                wrong.push(format!(
                    "{}, pass {pass}: {least:.3} to {most:.3}",
                    case.name()
                ));
            }
        }
        println!("| {line} |");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
