//! Thresholds between kernels that could both take a step, as timing whole steps has set them. With the cargo feature `tuning`, which no
//! shipped program has, the environment variable PERIGEE_TUNING gives others, for measurements of one against the other in one process,
//! where the weights lie in the same memory: variants with `;` between them, each of words `name=number`, by the fields' names. An empty
//! variant is what is shipped: `PERIGEE_TUNING="; select=513; bulk=64 router=65"` gives three.

/// Tokens and rows are those of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Tuning {
    /// Tokens up to which a shared expert is computed like a routed one: three launches fewer. Beyond, its many rows fill many tiles
    /// that each read its weights, and a dense product is faster.
    pub(crate) shared: usize,
    /// Tokens from which the router goes through tensor cores, where its weights are bfloat16 as stored.
    pub(crate) router: usize,
    /// Tokens from which selection and sort are one kernel, a block a token.
    pub(crate) select: usize,
    /// Rows of one token up to which their kernel computes KDA's gates too; beyond, each row's reading of their weights costs more than
    /// a product of its own.
    pub(crate) gates: usize,
    /// Rows of one token from which KDA's step is bound by the states' bytes.
    pub(crate) bulk: usize,
    /// Tokens up to which a recorded step's router computes the norm ahead of it, by clusters of blocks.
    pub(crate) normed: usize,
    /// Tokens with several parts of attention up to which blocks merge few channels each.
    pub(crate) merge: usize,
    /// Tokens up to which blocks of experts' products take tiles in turn.
    pub(crate) turns: usize,
    /// Tiles that they have blocks for, in per cent of those that even routing gives.
    pub(crate) tiles: usize,
    /// Tokens up to which blocks of those products have half as many rows of weights.
    pub(crate) narrow: usize,
}

/// What is shipped.
static SHIPPED: Tuning = Tuning {
    shared: 256,
    router: 33,
    select: 17,
    gates: 8,
    bulk: 24,
    normed: 128,
    merge: 1,
    turns: 128,
    tiles: 60,
    narrow: 16,
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
        let field = match name {
            "shared" => &mut tuning.shared,
            "router" => &mut tuning.router,
            "select" => &mut tuning.select,
            "gates" => &mut tuning.gates,
            "bulk" => &mut tuning.bulk,
            "normed" => &mut tuning.normed,
            "merge" => &mut tuning.merge,
            "turns" => &mut tuning.turns,
            "tiles" => &mut tuning.tiles,
            "narrow" => &mut tuning.narrow,
            _ => return Err(unknown()),
        };
        *field = value.parse().map_err(|_| unknown())?;
    }
    Ok(tuning)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_changes_what_it_names() {
        assert_eq!(parse("bulk=64  select=513"), Ok(Tuning { bulk: 64, select: 513, ..SHIPPED.clone() }));
        assert_eq!(parse(""), Ok(SHIPPED.clone()));
        for wrong in ["bulk", "bulk=", "balk=1", "select=-1"] {
            assert_eq!(parse(wrong), Err(wrong.to_owned()));
        }
    }
}
