//! What asking costs: the bytes that were sent and received are those of the formula, whatever the ranks, types and homes.

use perigee_backend::DType;
use perigee_engine::executor::StepPlan;
use perigee_migration::attention_bytes;

use crate::group::{Fed, Group, Options, feed, spans, text};
use crate::network::{Conduct, Network, kept, remote_plan, remote_row};

#[test]
fn bytes_are_those_of_the_formula() {
    for (tp, dtype, tokens) in [(1, DType::Fp32, 1), (2, DType::Bf16, 1), (4, DType::Fp32, 70), (4, DType::Bf16, 2)] {
        let network = Network::default();
        let open = |tp, client: &dyn Fn(usize) -> _| Group::open(&Options { tp, dtype, client, ..Options::default() });
        let (mut a, mut b) = (open(1, &|_| None), open(2, &|_| None));
        for (home, name, number) in [(&mut a, "a", 0), (&mut b, "b", 1)] {
            home.begin(0, &[0, 1, 2], &text(3, 0..130));
            network.join(name, home).publish("s", kept(&[(number, &[number as u32])]), 2);
        }
        let mut owner = open(tp, &|rank| network.client(rank));
        owner.take_state(&mut a, 0, 0);
        owner.take_pages(&mut a, &spans(&[2], 128, 130), &[3]);
        let shape = owner.ranks.answer_model().shape;
        let fed = text(3, 130..130 + tokens);
        let row = Fed { slots: (0, 1), local: (128, &[3, 4]), position: 130, tokens: &fed };
        let remote = remote_plan(&["a", "b"], vec![remote_row(0, "s", &[(0, 0, 1), (1, 1, 1)])]);
        let plan = StepPlan { remote, ..feed(&[row]) };
        let (output, _) = owner.step(&plan);
        assert_eq!((output.faulty, output.remote.tokens), (vec![], tokens.into()));
        let found = output.remote.query_bytes + output.remote.answer_bytes;
        assert_eq!(found, u64::from(tokens) * attention_bytes(&shape, dtype, 2), "{tp} ranks in {dtype:?}");

        network.set("b", Conduct::Gone);
        let (output, _) = owner.step(&plan);
        assert_eq!(output.faulty, [0]);
        let spent = output.remote;
        assert!(spent.query_bytes > 0 && spent.query_bytes + spent.answer_bytes < found, "{spent:?}");
    }
}

#[test]
fn a_step_without_remote_rows_costs_nothing() {
    let network = Network::default();
    let mut group = Group::open(&Options { tp: 2, client: &|rank| network.client(rank), ..Options::default() });
    group.begin(0, &[0], &text(3, 0..5));
    let (output, _) = group.step(&feed(&[Fed::local(0, &[0], 5, &[1])]));
    assert_eq!(output.remote, perigee_engine::remote::RemoteCounts::default());
    assert!(network.traffic().patience.is_empty());
}
