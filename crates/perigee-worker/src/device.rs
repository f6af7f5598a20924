//! Devices as the command line names them, and how ranks and replicas share a list of them.

/// A device as the command line names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Device {
    /// CPUs of this machine.
    Cpu,
    /// GPUs; rank r takes entry r modulo the length.
    Cuda(Vec<u32>),
}

impl Device {
    /// The devices of one of several equal replicas of `tp` ranks each: entries are dealt out to replica after replica, and
    /// from the first one again where there are too few.
    pub fn of_replica(&self, replica: usize, tp: usize) -> Self {
        let Self::Cuda(cards) = self else { return self.clone() };
        let mut cards = cards.clone();
        let first = (replica * tp).checked_rem(cards.len()).unwrap_or(0);
        cards.rotate_left(first);
        Self::Cuda(cards)
    }

    /// How many of `replicas` equal replicas have a rank on a card of this one's, itself included.
    pub fn replicas_beside(&self, replica: usize, (replicas, tp): (usize, usize)) -> usize {
        let cards = |replica: usize| match self.of_replica(replica, tp) {
            Self::Cuda(cards) => cards.into_iter().take(tp).collect(),
            Self::Cpu => Vec::new(),
        };
        let mine = cards(replica);
        (0..replicas).filter(|&other| cards(other).iter().any(|card| mine.contains(card))).count().max(1)
    }
}

impl std::str::FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("expected cpu, cuda or cuda:I,J,.. and found {text:?}");
        match text.split_once(':') {
            None if text == "cpu" => Ok(Self::Cpu),
            None if text == "cuda" => Ok(Self::Cuda(vec![0])),
            Some(("cuda", list)) => {
                let cards: Result<Vec<u32>, _> = list.split(',').map(str::parse).collect();
                cards.map(Self::Cuda).map_err(|_| wrong())
            }
            _ => Err(wrong()),
        }
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(cards) => {
                let cards: Vec<String> = cards.iter().map(u32::to_string).collect();
                write!(f, "cuda:{}", cards.join(","))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cards(text: &str) -> Device {
        text.parse().unwrap()
    }

    #[test]
    fn replicas_take_the_next_cards_of_the_list() {
        let dealt = |list: &str, tp| [0, 1, 2].map(|replica| cards(list).of_replica(replica, tp).to_string());
        assert_eq!(dealt("cuda:0,1", 1), ["cuda:0,1", "cuda:1,0", "cuda:0,1"]);
        assert_eq!(dealt("cuda:4,5,6,7", 2), ["cuda:4,5,6,7", "cuda:6,7,4,5", "cuda:4,5,6,7"]);
        assert_eq!(dealt("cuda", 4), ["cuda:0"; 3]);
        assert_eq!(dealt("cpu", 2), ["cpu"; 3]);
    }

    #[test]
    fn replicas_on_one_card_are_counted() {
        let beside = |list: &str, replicas, tp| {
            (0..replicas).map(|replica| cards(list).replicas_beside(replica, (replicas, tp))).collect::<Vec<_>>()
        };
        assert_eq!(beside("cuda", 3, 1), [3, 3, 3]);
        assert_eq!(beside("cuda:0,1", 2, 1), [1, 1]);
        assert_eq!(beside("cuda:0,1", 3, 1), [2, 1, 2]);
        assert_eq!(beside("cuda:0,1", 2, 2), [2, 2]);
        assert_eq!(beside("cuda:0,1,2", 2, 2), [2, 2], "the second replica has cards 2 and 0");
        assert_eq!(beside("cpu", 2, 1), [1, 1], "memory of CPUs is not divided by this");
    }
}
