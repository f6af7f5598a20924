//! What a rank's card is divided into: weights, working memory, graphs, state slots, and latent pages with the rest. The plan
//! is arithmetic over the model's shapes and the card's size, made before anything is loaded, so that what cannot fit is
//! refused at once; on cards of one kind all ranks make the same plan.

use std::fmt;

use perigee_backend::{BackendError, PAGE_TOKENS};

/// What the driver, its libraries and the kernels take on a card, and what allocations lose to rounding.
const FIXED_BYTES: u64 = 1 << 30;
/// What a captured graph takes at most.
const GRAPH_BYTES: u64 = 16 << 20;
/// Contexts for which the plan says how many sessions fit.
const CONTEXTS: [u64; 5] = [1 << 10, 8 << 10, 32 << 10, 128 << 10, 1 << 20];

/// What is to be put on a card.
#[derive(Debug, Clone, Copy)]
pub struct Request {
    /// Bytes of the card.
    pub card: u64,
    /// Share of them that this rank may use.
    pub fraction: f64,
    /// Bytes of weights.
    pub weights: u64,
    /// Bytes of activations and working memory of the largest step.
    pub working: u64,
    /// Graphs to be captured.
    pub graphs: usize,
    /// State slots.
    pub slots: usize,
    /// Bytes of a slot.
    pub slot_bytes: u64,
    /// Bytes of a latent page in all layers; 0 where no layer has latents.
    pub page_bytes: u64,
    /// Latent pages that were asked for; none for as many as fit.
    pub pages: Option<usize>,
    /// Pages of a session that must fit at least.
    pub longest: usize,
    /// Pages that all slots together can ever use.
    pub most_pages: usize,
}

/// A card's memory, divided.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MemoryPlan {
    /// Bytes of the card.
    pub card: u64,
    /// Bytes that this rank may use.
    pub budget: u64,
    /// Bytes of weights.
    pub weights: u64,
    /// Bytes of activations and working memory.
    pub working: u64,
    /// Bytes for graphs, the driver and its libraries.
    pub overhead: u64,
    /// State slots.
    pub slots: usize,
    /// Bytes of a slot.
    pub slot_bytes: u64,
    /// Latent pages.
    pub pages: usize,
    /// Bytes of a page.
    pub page_bytes: u64,
}

impl MemoryPlan {
    /// Divides a card.
    ///
    /// # Errors
    /// [`BackendError::Memory`] names the first part that does not fit, and what to change.
    pub fn make(request: &Request) -> Result<Self, BackendError> {
        let budget = (request.card as f64 * request.fraction) as u64;
        let overhead = FIXED_BYTES + GRAPH_BYTES * request.graphs as u64;
        let slots = request.slots as u64 * request.slot_bytes;
        let least_pages = request.pages.unwrap_or(request.longest.max(1));
        let mut left = budget;
        let parts = [
            ("the driver, its libraries and graphs".to_owned(), overhead, "raise --memory-fraction"),
            (
                "weights".to_owned(),
                request.weights,
                "use more ranks (--tp), a card with more memory, or a smaller model",
            ),
            ("activations of a step".to_owned(), request.working, "lower --token-budget or --max-batch"),
            (format!("{} state slots", request.slots), slots, "lower --state-slots"),
            (
                format!("{least_pages} latent pages"),
                least_pages as u64 * request.page_bytes,
                if request.pages.is_some() { "lower --latent-pages" } else { "lower --max-model-len or --state-slots" },
            ),
        ];
        for (what, bytes, remedy) in parts {
            if bytes > left {
                return Err(BackendError::Memory {
                    what,
                    bytes,
                    hint: format!(
                        "; of {} (--memory-fraction {} of the card's {}) {left} are left for them: {remedy}",
                        budget, request.fraction, request.card
                    ),
                });
            }
            left -= bytes;
        }
        let more = left.checked_div(request.page_bytes).unwrap_or(0);
        let fit = least_pages.saturating_add(usize::try_from(more).unwrap_or(usize::MAX));
        let pages = request.pages.unwrap_or(fit.min(request.most_pages.max(least_pages)));
        Ok(Self {
            card: request.card,
            budget,
            weights: request.weights,
            working: request.working,
            overhead,
            slots: request.slots,
            slot_bytes: request.slot_bytes,
            // Places of latents are 32-bit numbers of positions.
            pages: pages.min(u32::MAX as usize / PAGE_TOKENS),
            page_bytes: request.page_bytes,
        })
    }

    /// Sessions of `context` positions each that fit at once.
    pub fn sessions(&self, context: u64) -> usize {
        let pages = usize::try_from(context.div_ceil(PAGE_TOKENS as u64)).unwrap_or(usize::MAX).max(1);
        self.slots.min(self.pages / pages)
    }
}

impl fmt::Display for MemoryPlan {
    /// One line for the person who starts a replica.
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
        write!(
            out,
            "{:.1} of {:.1} GiB: weights {:.1}, activations {:.1}, graphs and driver {:.1}, {} state slots {:.1}, {} latent \
             pages {:.1}; sessions that fit:",
            gib(self.budget),
            gib(self.card),
            gib(self.weights),
            gib(self.working),
            gib(self.overhead),
            self.slots,
            gib(self.slots as u64 * self.slot_bytes),
            self.pages,
            gib(self.pages as u64 * self.page_bytes),
        )?;
        for (at, context) in CONTEXTS.into_iter().enumerate() {
            let (separator, sessions) = (if at == 0 { "" } else { "," }, self.sessions(context));
            write!(out, "{separator} {sessions} of {}k", context >> 10)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The 48B shape on a card of 143,771 MiB.
    fn request() -> Request {
        Request {
            card: 143_771 << 20,
            fraction: 0.9,
            weights: 98_280_000_000,
            working: 3 << 30,
            graphs: 16,
            slots: 256,
            slot_bytes: 43_417_600,
            page_bytes: 516_096,
            pages: None,
            longest: 16_384,
            most_pages: usize::MAX,
        }
    }

    #[test]
    fn pages_take_what_is_left_and_no_more() {
        let plan = MemoryPlan::make(&request()).unwrap();
        let taken = plan.weights
            + plan.working
            + plan.overhead
            + plan.slots as u64 * plan.slot_bytes
            + plan.pages as u64 * plan.page_bytes;
        assert!(taken <= plan.budget && plan.budget - taken < plan.page_bytes, "{taken} of {}", plan.budget);
        assert_eq!(plan.sessions(1 << 10), 256);
        assert_eq!(plan.sessions(1 << 20), plan.pages / 16_384);
        assert!(plan.sessions(1 << 20) >= 1, "{plan}");
    }

    #[test]
    fn what_does_not_fit_is_named_with_a_remedy() {
        let refused = |change: fn(&mut Request)| {
            let mut request = request();
            change(&mut request);
            MemoryPlan::make(&request).unwrap_err().to_string()
        };
        let weights = refused(|request| request.card = 81_559 << 20);
        assert!(weights.contains("weights needs 98280000000 bytes") && weights.contains("--tp"), "{weights}");
        let slots = refused(|request| request.slots = 1000);
        assert!(slots.contains("1000 state slots") && slots.contains("lower --state-slots"), "{slots}");
        let pages = refused(|request| request.pages = Some(1 << 20));
        assert!(pages.contains("1048576 latent pages") && pages.contains("lower --latent-pages"), "{pages}");
        let longest = refused(|request| request.longest = 1 << 20);
        assert!(longest.contains("--max-model-len"), "{longest}");
        let small = refused(|request| request.fraction = 0.001);
        assert!(small.contains("the driver") && small.contains("raise --memory-fraction"), "{small}");
    }

    #[test]
    fn no_more_pages_are_taken_than_sessions_can_use() {
        let plan = MemoryPlan::make(&Request { most_pages: 20_000, ..request() }).unwrap();
        assert_eq!(plan.pages, 20_000);
    }

    #[test]
    fn asked_pages_are_given_as_asked() {
        let plan = MemoryPlan::make(&Request { pages: Some(640), ..request() }).unwrap();
        assert_eq!((plan.pages, plan.sessions(1 << 10)), (640, 40));
    }

    #[test]
    fn a_model_without_latents_is_not_divided_by() {
        let plan = MemoryPlan::make(&Request { page_bytes: 0, longest: 3, ..request() }).unwrap();
        assert_eq!(plan.pages, 3);
    }
}
