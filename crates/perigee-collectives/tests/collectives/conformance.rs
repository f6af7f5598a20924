//! The conformance of a group, written once for every implementation of `Collective`, and the helpers that run a group
//! as threads. Expected values are computed here from the ranks' inputs, never by the code under test.

use std::thread;

use perigee_collectives::{Collective, CollectiveError};

/// Below one direct hop, at its limit, past one chunk and, for every group size tested, past a whole segment.
const LENGTHS: [usize; 7] = [0, 1, 7, 1000, 8192, 8193, 100_003];

/// What `rank` contributes: signs and magnitudes so mixed that the order of addition shows in the last bits.
fn floats(rank: usize, length: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ ((rank as u64 + 1) << 40) ^ length as u64;
    let mut next = || {
        // splitmix64
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    (0..length)
        .map(|_| {
            let bits = next();
            let unit = (bits >> 40) as f32 / (1 << 24) as f32 - 0.5;
            unit * f32::powi(2.0, (bits % 12) as i32)
        })
        .collect()
}

/// The element-wise sum of the ranks' floats, added in the order given.
fn sum_in_order(order: impl Iterator<Item = usize>, length: usize, seed: u64) -> Vec<f32> {
    order
        .map(|rank| floats(rank, length, seed))
        .reduce(|sum, next| sum.iter().zip(&next).map(|(a, b)| a + b).collect())
        .unwrap_or_default()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Everything that one rank of a healthy group must see. All ranks must run it together.
pub(crate) fn conform(group: &mut impl Collective) {
    let (rank, size) = (group.rank(), group.size());
    all_reduce_conforms(group, 1);
    all_reduce_conforms(group, 2);
    all_gather_conforms(group);

    for root in 0..size {
        for length in [0, 1, 4096, 200_001] {
            let payload = |root: usize| (0..length).map(|i| (i * 31 + root * 7 + 1) as u8).collect::<Vec<u8>>();
            let mut data = if rank == root { payload(root) } else { vec![0xee; length] };
            group.broadcast(root, &mut data).unwrap();
            assert_eq!(data, payload(root), "broadcast of {length} bytes from {root} on rank {rank}");
        }
    }

    for length in [0, 1, 65, 20_000] {
        let word = |rank: usize, i: usize| 1_u64.rotate_left((i * (rank + 3)) as u32) | (rank as u64) << 60;
        let mut words: Vec<u64> = (0..length).map(|i| word(rank, i)).collect();
        group.or(&mut words).unwrap();
        let expected: Vec<u64> = (0..length).map(|i| (0..size).fold(0, |all, rank| all | word(rank, i))).collect();
        assert_eq!(words, expected, "or of {length} words on rank {rank}");
    }
}

fn all_reduce_conforms(group: &mut impl Collective, seed: u64) {
    let (rank, size) = (group.rank(), group.size());
    for length in LENGTHS {
        let mut data = floats(rank, length, seed);
        group.all_reduce(&mut data).unwrap();
        let expected = sum_in_order(0..size, length, seed);
        assert!(bits(&data) == bits(&expected), "all_reduce of {length} on rank {rank} of {size}");
        if size > 2 && length > 100 {
            let reversed = sum_in_order((0..size).rev(), length, seed);
            assert!(bits(&expected) != bits(&reversed), "the inputs do not show the order of addition");
        }
    }
    // A sum that starts from zero instead of from rank 0 would lose the sign.
    let mut negative_zeros = [-0.0_f32; 3];
    group.all_reduce(&mut negative_zeros).unwrap();
    assert_eq!(bits(&negative_zeros), bits(&[-0.0; 3]));
}

fn all_gather_conforms(group: &mut impl Collective) {
    let (rank, size) = (group.rank(), group.size());
    let uneven = |scale: usize| (0..size).map(|r| (size - 1 - r) * scale).collect::<Vec<_>>();
    for counts in [vec![0; size], vec![5; size], uneven(1), uneven(17_001)] {
        let mut out = vec![f32::NAN; counts.iter().sum()];
        group.all_gather(&floats(rank, counts[rank], 3), &counts, &mut out).unwrap();
        let expected: Vec<f32> = (0..size).flat_map(|r| floats(r, counts[r], 3)).collect();
        assert!(bits(&out) == bits(&expected), "all_gather of {counts:?} on rank {rank}");
    }
}

/// Runs `body` for every rank on a thread of its own and returns the results in rank order.
pub(crate) fn on_threads<C: Collective + 'static, T: Send + 'static>(
    group: Vec<C>,
    body: impl Fn(C) -> T + Clone + Send + 'static,
) -> Vec<T> {
    let threads: Vec<_> = group
        .into_iter()
        .map(|rank| {
            let body = body.clone();
            thread::spawn(move || body(rank))
        })
        .collect();
    threads.into_iter().map(|thread| thread.join().unwrap()).collect()
}

/// A group that works, then loses its last rank: every other one must name it, and fail at once from then on.
pub(crate) fn conform_on_loss<C: Collective + 'static>(group: Vec<C>) {
    let last = group.len() - 1;
    on_threads(group, move |mut rank| {
        let mut data = vec![1.0; 5000];
        rank.all_reduce(&mut data).unwrap();
        assert_eq!(data[4999], (last + 1) as f32);
        if rank.rank() == last {
            return;
        }
        let started = std::time::Instant::now();
        let lost = rank.all_reduce(&mut data).unwrap_err();
        assert!(matches!(lost, CollectiveError::PeerLost { rank } if rank == last), "{lost}");
        let poisoned = rank.or(&mut [0]).unwrap_err();
        let CollectiveError::Poisoned { cause } = poisoned else { panic!("{poisoned}") };
        assert_eq!(cause, lost.to_string());
        assert!(started.elapsed().as_secs_f32() < 1.0);
    });
}

/// A rank that makes another call than the others: all of them must fail, and some rank must name both calls.
pub(crate) fn conform_on_divergence<C: Collective + 'static>(group: Vec<C>) {
    let errors = on_threads(group, |mut rank| {
        let mut data = vec![1.0; 10];
        if rank.rank() == 1 {
            rank.or(&mut [1]).and_then(|()| rank.or(&mut [1])).unwrap_err()
        } else {
            rank.all_reduce(&mut data).and_then(|()| rank.all_reduce(&mut data)).unwrap_err()
        }
    });
    let diverged = errors.iter().filter_map(|error| match error {
        CollectiveError::Diverged(divergence) => Some(divergence),
        _ => None,
    });
    let named: Vec<String> = diverged.map(|divergence| divergence.to_string()).collect();
    assert!(!named.is_empty(), "{errors:?}");
    assert!(named.iter().all(|text| text.contains("all_reduce (call ") && text.contains("or (call ")), "{named:?}");
}

/// A rank of three that fails on its own arguments: the others must be told who gave up, not merely lose it.
pub(crate) fn conform_on_misuse<C: Collective + 'static>(group: Vec<C>) {
    let errors = on_threads(group, |mut rank| {
        let root = if rank.rank() == 1 { 7 } else { 1 };
        rank.broadcast(root, &mut [0; 4]).unwrap_err()
    });
    assert!(matches!(errors[1], CollectiveError::RootOutOfRange { root: 7, size: 3 }), "{}", errors[1]);
    for error in [&errors[0], &errors[2]] {
        assert!(matches!(error, CollectiveError::GaveUp { reporter: 1, rank: 1 }), "{error}");
    }
}
