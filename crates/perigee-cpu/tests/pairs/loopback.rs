//! Pairs between CPU backends over loopback: a slot arrives with its bits, in both storage types; and a target that is killed in
//! the middle, or is none, breaks one pair and no other.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use perigee_backend::pairs::{PairEnd, Pairs, Patience};
use perigee_backend::{Backend, CacheShape, DType, PairOrder, PairState, StateKind, StatePart};
use perigee_collectives::Solo;
use perigee_cpu::{CpuBackend, CpuOptions, Loopback};

/// Longest wait of a test for another thread or process.
const LONG: Duration = Duration::from_secs(60);
/// Where the target's process finds its invitation, in hexadecimal.
const INVITATION: &str = "PERIGEE_TEST_INVITATION";
const SHAPE: CacheShape = CacheShape {
    slots: 3,
    pages: 1,
    kda_layers: 2,
    kda_heads: 2,
    kda_head_dim: 4,
    conv: 4,
    mla_layers: 1,
    latent_width: 8,
};
const KINDS: [StateKind; 4] = [StateKind::Recurrent, StateKind::ConvQ, StateKind::ConvK, StateKind::ConvV];

fn backend(activation: DType) -> CpuBackend {
    let mut backend = CpuBackend::new(CpuOptions { activation, threads: 1 }, Box::new(Solo));
    backend.reserve_cache(&SHAPE).unwrap();
    backend
}

fn parts() -> impl Iterator<Item = StatePart> {
    let part = |layer| KINDS.map(|kind| StatePart { layer, kind, first_head: 0, heads: SHAPE.kda_heads as u32 });
    (0..SHAPE.kda_layers as u32).flat_map(part)
}

fn slot(backend: &mut CpuBackend, slot: u32) -> Vec<Vec<u8>> {
    parts().map(|part| backend.export_state(slot, &part).unwrap()).collect()
}

/// What `look` says once it is something else than `was`.
fn after(was: &PairState, mut look: impl FnMut() -> PairState) -> PairState {
    let began = Instant::now();
    loop {
        let state = look();
        if state != *was {
            return state;
        }
        assert!(began.elapsed() < LONG, "it stays {state:?}");
        std::thread::yield_now();
    }
}

#[test]
fn a_slot_arrives_with_its_bits() {
    for activation in [DType::Fp32, DType::Bf16] {
        let (mut source, mut target) = (backend(activation), backend(activation));
        let mut number = 0.0;
        for part in parts() {
            let zeros = {
                source.clear_slots(&[1]).unwrap();
                source.export_state(1, &part).unwrap()
            };
            let dtype = if part.kind == StateKind::Recurrent { DType::Fp32 } else { activation };
            let next = || {
                number += 0.5;
                let bytes = f32::to_le_bytes(number);
                if dtype == DType::Fp32 { bytes.to_vec() } else { bytes[2..].to_vec() }
            };
            let bytes: Vec<u8> = std::iter::repeat_with(next).take(zeros.len() / dtype.bytes()).flatten().collect();
            source.import_state(0, &part, &bytes).unwrap();
        }
        let invitation = source.invite_pair().unwrap().unwrap();
        let meet = |end| PairOrder::Meet { end, patience: LONG };
        assert_eq!(target.pair(&invitation, meet(PairEnd::Target)).unwrap(), PairState::Meeting);
        assert_eq!(source.pair(&invitation, meet(PairEnd::Source)).unwrap(), PairState::Meeting);
        for backend in [&mut source, &mut target] {
            let look = || backend.pair(&invitation, PairOrder::Look).unwrap();
            assert_eq!(after(&PairState::Meeting, look), PairState::Ready);
        }
        assert_eq!(target.pair(&invitation, PairOrder::Expect).unwrap(), PairState::Busy);
        assert_eq!(source.pair(&invitation, PairOrder::Send { slot: 0 }).unwrap(), PairState::Busy);
        assert_eq!(target.pair(&invitation, PairOrder::Take { slot: 2 }).unwrap(), PairState::Ready);
        assert_eq!(slot(&mut target, 2), slot(&mut source, 0), "{activation:?}");
        assert_eq!(target.state_sums(2, 0).unwrap(), source.state_sums(0, 0).unwrap());
        assert!(target.pair(&invitation, PairOrder::Take { slot: 2 }).is_err(), "it is not there twice");
        assert!(
            source.pair(&invitation, PairOrder::Send { slot: SHAPE.slots as u32 }).is_err(),
            "there is no such slot"
        );
    }
}

#[test]
fn whoever_shows_another_secret_is_not_the_target() {
    let mut ends = [(); 2].map(|()| Pairs::new(Loopback::default(), Patience::default()));
    let invitation = ends[0].invite().unwrap();
    let mut guessed = invitation.clone();
    *guessed.last_mut().unwrap() ^= 1;
    let [source, target] = &mut ends;
    source.meet(&invitation, PairEnd::Source, LONG);
    target.meet(&guessed, PairEnd::Target, LONG);
    assert_eq!(after(&PairState::Meeting, || target.state(&guessed)), PairState::Ready, "it has connected");
    // It is sent away, which it sees when it needs the pair; then the right one comes.
    target.expect(&guessed, vec![0; 9]);
    let broken = after(&PairState::Busy, || target.state(&guessed));
    assert!(matches!(broken, PairState::Broken(_)), "{broken:?}");
    assert_eq!(source.state(&invitation), PairState::Meeting);
    target.meet(&invitation, PairEnd::Target, LONG);
    assert_eq!(after(&PairState::Meeting, || source.state(&invitation)), PairState::Ready);
}

/// More than what connections hold by themselves.
const LARGE: usize = 64 << 20;

/// The target, in a process of its own: it takes one parcel, expects another and takes no more of it than arrives.
fn be_target(invitation: &str) -> ! {
    let bytes: Vec<u8> = invitation
        .as_bytes()
        .chunks(2)
        .map(|two| u8::from_str_radix(std::str::from_utf8(two).unwrap(), 16).unwrap())
        .collect();
    let mut pairs = Pairs::new(Loopback::default(), Patience::default());
    pairs.meet(&bytes, PairEnd::Target, LONG);
    assert_eq!(after(&PairState::Meeting, || pairs.state(&bytes)), PairState::Ready);
    pairs.expect(&bytes, vec![0; 3]);
    assert_eq!(pairs.take(&bytes).unwrap(), [1, 2, 3]);
    // It never expects the second one: its source is in the middle of it until this process is killed.
    loop {
        std::thread::park();
    }
}

fn target(invitation: &[u8]) -> Child {
    let hexadecimal: String = invitation.iter().map(|byte| format!("{byte:02x}")).collect();
    let name = "loopback::a_target_that_is_killed_in_the_middle_breaks_its_pair_and_no_other";
    Command::new(std::env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture"])
        .env(INVITATION, hexadecimal)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn a_target_that_is_killed_in_the_middle_breaks_its_pair_and_no_other() {
    if let Ok(invitation) = std::env::var(INVITATION) {
        be_target(&invitation);
    }
    let mut source = Pairs::new(Loopback::default(), Patience::default());
    let invitations = [(); 2].map(|()| source.invite().unwrap());
    let mut targets = invitations.clone().map(|invitation| target(&invitation));
    for invitation in &invitations {
        source.meet(invitation, PairEnd::Source, LONG);
    }
    for invitation in &invitations {
        assert_eq!(after(&PairState::Meeting, || source.state(invitation)), PairState::Ready);
    }
    let [first, second] = &invitations;
    assert_eq!(source.send(first, vec![1, 2, 3]), PairState::Busy);
    assert_eq!(after(&PairState::Busy, || source.state(first)), PairState::Ready, "it has it");
    assert_eq!(source.send(first, vec![7; LARGE]), PairState::Busy);
    targets[0].kill().unwrap();
    let broken = after(&PairState::Busy, || source.state(first));
    assert!(matches!(broken, PairState::Broken(_)), "{broken:?}");
    assert_eq!(source.send(second, vec![1, 2, 3]), PairState::Busy);
    assert_eq!(after(&PairState::Busy, || source.state(second)), PairState::Ready, "the other one is whole");
    targets[1].kill().unwrap();
    for target in &mut targets {
        target.wait().unwrap();
    }
}
