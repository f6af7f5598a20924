//! Pairs over channels of this process: orders, states, time limits, and ends.

use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};

use super::*;

/// Longest wait of a test for a thread.
const LONG: Duration = Duration::from_secs(30);
const PATIENCE: Patience = Patience { meeting: LONG, idle: LONG };

/// Both ends of pairs by invitation; the first to come makes the other's end too.
#[derive(Clone, Default)]
struct Meeting(Arc<Mutex<Inner>>);

#[derive(Default)]
struct Inner {
    invited: u8,
    forgotten: usize,
    waiting: HashMap<Vec<u8>, Wire>,
}

struct Wire {
    out: SyncSender<u64>,
    from: Receiver<u64>,
}

impl Meeting {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap()
    }
}

impl PairTransport for Meeting {
    type Parcel = u64;
    type Link = Wire;

    fn invite(&self) -> Result<Vec<u8>, String> {
        let mut inner = self.lock();
        inner.invited += 1;
        Ok(vec![inner.invited])
    }

    fn meet(&self, invitation: &[u8], end: PairEnd, watch: &Watch) -> Result<Wire, String> {
        if end == PairEnd::Source {
            let ((to, received), (back, heard)) = (sync_channel(0), sync_channel(0));
            self.lock().waiting.insert(invitation.to_vec(), Wire { out: back, from: received });
            return Ok(Wire { out: to, from: heard });
        }
        loop {
            if let Some(wire) = self.lock().waiting.remove(invitation) {
                return Ok(wire);
            }
            watch.check()?;
            std::thread::yield_now();
        }
    }

    fn forget(&self, _invitation: &[u8]) {
        self.lock().forgotten += 1;
    }
}

impl PairLink for Wire {
    type Parcel = u64;

    fn send(&mut self, parcel: &mut u64, watch: &Watch) -> Result<(), String> {
        while let Err(error) = self.out.try_send(*parcel) {
            if matches!(error, std::sync::mpsc::TrySendError::Disconnected(_)) {
                return Err("the other end is gone".into());
            }
            watch.check()?;
            std::thread::yield_now();
        }
        Ok(())
    }

    fn receive(&mut self, parcel: &mut u64, watch: &Watch) -> Result<(), String> {
        loop {
            match self.from.recv_timeout(Duration::from_millis(1)) {
                Ok(came) => break *parcel = came,
                Err(RecvTimeoutError::Timeout) => watch.check()?,
                Err(RecvTimeoutError::Disconnected) => return Err("the other end is gone".into()),
            }
        }
        Ok(())
    }
}

/// The state of a pair once it is no longer that.
fn after(pairs: &Pairs<Meeting>, invitation: &[u8], was: &PairState) -> PairState {
    let began = Instant::now();
    loop {
        let state = pairs.state(invitation);
        if state != *was {
            return state;
        }
        assert!(began.elapsed() < LONG, "it stays {state:?}");
        std::thread::yield_now();
    }
}

fn met(parcels: Duration) -> (Meeting, [Pairs<Meeting>; 2], Vec<u8>) {
    let meeting = Meeting::default();
    let mut ends = [0, 1].map(|_| Pairs::new(meeting.clone(), PATIENCE));
    let invitation = ends[0].invite().unwrap();
    for (pairs, end) in ends.iter_mut().zip([PairEnd::Source, PairEnd::Target]) {
        assert_eq!(pairs.meet(&invitation, end, parcels), PairState::Meeting);
    }
    for pairs in &ends {
        assert_eq!(after(pairs, &invitation, &PairState::Meeting), PairState::Ready);
    }
    (meeting, ends, invitation)
}

#[test]
fn parcels_come_as_they_were_sent_one_after_the_other() {
    let (_, [mut source, mut target], invitation) = met(LONG);
    for parcel in [7, 8, u64::MAX] {
        assert_eq!(target.expect(&invitation, 0), PairState::Busy);
        assert_eq!(target.expect(&invitation, 0), PairState::Busy, "one at a time");
        assert_eq!(source.send(&invitation, parcel), PairState::Busy);
        assert_eq!(target.take(&invitation), Ok(parcel));
        assert_eq!(target.state(&invitation), PairState::Ready);
        assert_eq!(after(&source, &invitation, &PairState::Busy), PairState::Ready);
    }
    assert!(target.take(&invitation).unwrap_err().contains("Ready"), "what was taken is not there twice");
}

#[test]
fn an_end_that_goes_breaks_its_pair_and_no_other() {
    let (meeting, [mut source, mut target], first) = met(LONG);
    let second = source.invite().unwrap();
    assert_eq!(source.meet(&second, PairEnd::Source, LONG), PairState::Meeting);
    let mut third = Pairs::new(meeting.clone(), PATIENCE);
    assert_eq!(third.meet(&second, PairEnd::Target, LONG), PairState::Meeting);
    assert_eq!(after(&third, &second, &PairState::Meeting), PairState::Ready);
    assert_eq!(after(&source, &second, &PairState::Meeting), PairState::Ready);

    assert_eq!(source.send(&first, 1), PairState::Busy);
    target.close(&first);
    let PairState::Broken(why) = after(&source, &first, &PairState::Busy) else { panic!("it is whole") };
    assert!(why.contains("gone"), "{why}");
    assert!(matches!(source.send(&first, 1), PairState::Broken(_)));
    assert_eq!((source.send(&second, 2), third.expect(&second, 0)), (PairState::Busy, PairState::Busy));
    assert_eq!(third.take(&second), Ok(2));
    source.close(&first);
    assert_eq!(source.state(&first), unknown());
}

#[test]
fn a_silent_end_breaks_the_pair_in_time() {
    let (_, [mut source, mut target], invitation) = met(Duration::from_millis(20));
    assert_eq!(target.expect(&invitation, 0), PairState::Busy);
    let PairState::Broken(why) = after(&target, &invitation, &PairState::Busy) else { panic!("it is whole") };
    assert!(why.contains("silent"), "{why}");
    assert!(target.take(&invitation).unwrap_err().contains("silent"));
    // The other end finds out when it needs the pair.
    assert_eq!(source.send(&invitation, 1), PairState::Busy);
    assert!(matches!(after(&source, &invitation, &PairState::Busy), PairState::Broken(_)));
}

#[test]
fn what_waits_is_called_off_when_its_pair_is_closed() {
    let meeting = Meeting::default();
    let mut pairs = Pairs::new(meeting.clone(), PATIENCE);
    let invitation = pairs.invite().unwrap();
    assert_eq!(pairs.meet(&invitation, PairEnd::Target, LONG), PairState::Meeting, "its source never comes");
    let shared = Arc::clone(&pairs.open[&invitation].shared);
    pairs.close(&invitation);
    let is_meeting = |progress: &mut Progress<u64>| matches!(progress, Progress::Meeting);
    let (progress, _) = shared.changed.wait_timeout_while(shared.lock(), LONG, is_meeting).unwrap();
    let PairState::Broken(why) = progress.state() else { panic!("it is {:?}", progress.state()) };
    assert!(why.contains("called off"), "{why}");
    assert_eq!(meeting.lock().forgotten, 1);
}

#[test]
fn there_are_so_many_pairs_and_no_more() {
    let mut pairs = Pairs::new(Meeting::default(), PATIENCE);
    let invitations: Vec<_> = (0..=MOST_PAIRS).map(|_| pairs.invite().unwrap()).collect();
    for invitation in &invitations[..MOST_PAIRS] {
        assert_eq!(pairs.meet(invitation, PairEnd::Target, LONG), PairState::Meeting);
    }
    let refused = pairs.meet(&invitations[MOST_PAIRS], PairEnd::Target, LONG);
    assert!(matches!(refused, PairState::Broken(ref why) if why.contains("already")), "{refused:?}");
    pairs.close(&invitations[0]);
    assert_eq!(pairs.meet(&invitations[MOST_PAIRS], PairEnd::Target, LONG), PairState::Meeting);
}

#[test]
fn all_ranks_are_as_far_as_the_last_of_them() {
    use PairState::{Broken, Busy, Meeting, Ready};
    let broken = || Broken("it broke".into());
    for (one, other, both) in [
        (Ready, Ready, Ready),
        (Ready, Busy, Busy),
        (Meeting, Busy, Meeting),
        (Ready, broken(), broken()),
        (broken(), Meeting, broken()),
    ] {
        assert_eq!(one.clone().join(other.clone()), both);
        assert_eq!(other.join(one), both);
    }
}
