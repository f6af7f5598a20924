//! Which kernel a step takes where several could: every threshold between kernels that the step's size decides, in one place. With the
//! cargo feature `tuning`, which no shipped program has, PERIGEE_TUNING gives others, for measurements of one against the other in one
//! process, where the weights lie in the same memory: variants behind each other, with `;` between them, each of words `name=number`, by
//! the fields' names, and `plan=ROWSxDEPTHxOUT:INDEX` for a library product. An empty variant is what is shipped.

/// A library product whose algorithm is not the first that the library proposes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ChosenPlan {
    pub(crate) rows: usize,
    pub(crate) depth: usize,
    pub(crate) out: usize,
    /// Among the library's proposals.
    pub(crate) index: usize,
}

/// Thresholds and forms. Tokens and rows are those of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Tuning {
    /// Tokens up to which a shared expert is computed like a routed one: three launches fewer. Beyond, its many rows fill many tiles
    /// that each read its weights, and a dense product is faster.
    pub(crate) shared: usize,
    /// Tokens from which the router goes through tensor cores, where its weights are bfloat16 as stored.
    pub(crate) router: usize,
    /// Blocks of the router that fill a device: with more of them the depth is cut into more parts, which the selection adds.
    pub(crate) router_blocks: usize,
    /// Tokens from which selection and sort are one kernel, a block a token.
    pub(crate) select: usize,
    /// Tokens from which blocks of experts with few rows stay for several tiles.
    pub(crate) stay: usize,
    /// Tokens from which tiles of experts with few rows ask for tokens two buffers ahead.
    pub(crate) deep: usize,
    /// Tokens from which such tiles have up to 48 rows.
    pub(crate) tall: usize,
    /// Experts whose weights are asked for in the second-level cache while tokens choose theirs, the shared one first.
    pub(crate) ahead: usize,
    /// Bytes of every row of the next layer's projection that the sum of experts asks for in the second-level cache.
    pub(crate) next: usize,
    /// Neighbouring channels of one token's product down that are one piece for the copy engine.
    pub(crate) down: usize,
    /// Whether the parts of few tokens' attention are merged by blocks that read all weights at once: 1, else 0.
    pub(crate) merge: usize,
    /// Whether latents' pages are dealt out to blocks that stay, where all rows are of one token: 1, else 0.
    pub(crate) deal: usize,
    /// Rows of one token up to which their kernel computes KDA's gates too; beyond, each row's reading of their weights costs more than
    /// a product of its own.
    pub(crate) gates_within: usize,
    /// Rows of one token from which a kernel of ours computes KDA's gates, for the next to begin beside it.
    pub(crate) gates: usize,
    /// Rows of one token from which KDA's step is bound by the states' bytes.
    pub(crate) bulk: usize,
    /// What that kernel keeps longest in the second-level cache: 1 what it stores, 2 what it loads, and 4 for blocks that end early.
    pub(crate) keep: usize,
    /// Library products with an algorithm of their own.
    pub(crate) plans: Vec<ChosenPlan>,
}

/// A threshold that no step reaches.
const NEVER: usize = usize::MAX;

/// What is shipped.
static SHIPPED: Tuning = Tuning {
    shared: 256,
    router: 33,
    router_blocks: 144,
    select: 17,
    stay: NEVER,
    deep: NEVER,
    tall: NEVER,
    ahead: 0,
    next: 0,
    down: 3,
    merge: 0,
    deal: 1,
    gates_within: 8,
    gates: NEVER,
    bulk: 24,
    keep: 0,
    plans: Vec::new(),
};

/// The thresholds of this process.
#[cfg(not(feature = "tuning"))]
pub(crate) fn tuning() -> &'static Tuning {
    &SHIPPED
}

#[cfg(feature = "tuning")]
pub use variants::{choose_variant, variants};
#[cfg(feature = "tuning")]
pub(crate) use variants::{chosen, tuning};

#[cfg(feature = "tuning")]
mod variants {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::{Tuning, parse};

    static VARIANTS: OnceLock<Vec<(String, Tuning)>> = OnceLock::new();
    static CHOSEN: AtomicUsize = AtomicUsize::new(0);

    /// The thresholds of this moment.
    pub(crate) fn tuning() -> &'static Tuning {
        &all()[chosen()].1
    }

    /// Which of the variants applies.
    pub(crate) fn chosen() -> usize {
        CHOSEN.load(Ordering::Relaxed) % all().len()
    }

    /// The variants that PERIGEE_TUNING gives, as it gives them.
    pub fn variants() -> Vec<String> {
        all().iter().map(|(text, _)| text.clone()).collect()
    }

    /// Lets one of them apply to all backends, from their next step on.
    pub fn choose_variant(index: usize) {
        CHOSEN.store(index, Ordering::Relaxed);
    }

    fn all() -> &'static [(String, Tuning)] {
        VARIANTS.get_or_init(|| {
            let text = std::env::var("PERIGEE_TUNING").unwrap_or_default();
            let read = |variant: &str| {
                let tuning = parse(variant).unwrap_or_else(|word| {
                    // A measurement of something else than was asked for is worse than none.
                    eprintln!("PERIGEE_TUNING: {word:?} is not a threshold and its number");
                    std::process::exit(2)
                });
                (variant.trim().to_owned(), tuning)
            };
            text.split(';').map(read).collect()
        })
    }
}

/// The shipped thresholds with those that the text gives; the word that gives none, else.
#[cfg(any(feature = "tuning", test))]
fn parse(text: &str) -> Result<Tuning, String> {
    let mut tuning = SHIPPED.clone();
    for word in text.split_whitespace() {
        let unknown = || word.to_owned();
        let (name, value) = word.split_once('=').ok_or_else(unknown)?;
        if name == "plan" {
            tuning.plans.push(plan(value).ok_or_else(unknown)?);
            continue;
        }
        let field = match name {
            "shared" => &mut tuning.shared,
            "router" => &mut tuning.router,
            "router_blocks" => &mut tuning.router_blocks,
            "select" => &mut tuning.select,
            "stay" => &mut tuning.stay,
            "deep" => &mut tuning.deep,
            "tall" => &mut tuning.tall,
            "ahead" => &mut tuning.ahead,
            "next" => &mut tuning.next,
            "down" => &mut tuning.down,
            "merge" => &mut tuning.merge,
            "deal" => &mut tuning.deal,
            "gates_within" => &mut tuning.gates_within,
            "gates" => &mut tuning.gates,
            "bulk" => &mut tuning.bulk,
            "keep" => &mut tuning.keep,
            _ => return Err(unknown()),
        };
        *field = value.parse().map_err(|_| unknown())?;
    }
    Ok(tuning)
}

#[cfg(any(feature = "tuning", test))]
fn plan(text: &str) -> Option<ChosenPlan> {
    let (shape, index) = text.split_once(':')?;
    let numbers: Vec<usize> = shape.split('x').map(|part| part.parse().ok()).collect::<Option<_>>()?;
    let [rows, depth, out] = numbers.try_into().ok()?;
    Some(ChosenPlan { rows, depth, out, index: index.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_changes_what_it_names() {
        let tuning = parse("keep=3 gates=17  plan=64x2304x12576:2").unwrap();
        let plans = vec![ChosenPlan { rows: 64, depth: 2304, out: 12_576, index: 2 }];
        assert_eq!(tuning, Tuning { keep: 3, gates: 17, plans, ..SHIPPED.clone() });
        assert_eq!(parse(""), Ok(SHIPPED.clone()));
        for wrong in ["keep", "keep=", "kept=1", "plan=64x2304:1", "plan=64x2304x8"] {
            assert_eq!(parse(wrong), Err(wrong.to_owned()));
        }
    }
}
