//! What a session says before and after a move, where its tokens prove nothing: two replicas in this process, the experts of an
//! undisturbed run forced, so that a rounding cannot choose others. The bits of state and last page are the same at both ends by
//! their digests, logits stay within the limits of the type; then the pieces that a device records are held to the same steps run
//! op by op. With `answering`, instead: a home's own time of a token while it answers as often as a session asks, and as
//! often as it can.
//!
//! usage: moved MODEL cpu|cuda fp32|bf16 [answering CONTEXT...]

mod answering;
mod replica;

use std::process::ExitCode;

use perigee_backend::{Backend, DType};
use perigee_collectives::Solo;
use perigee_engine::executor::{Executor, StateSource, StepPlan};
use perigee_engine::protocol::ForcedExperts;
use perigee_model::{ModelSpec, WeightSource};

use self::replica::{Home, Outcome, PAGE, Replica, SESSION, Seat, asks, fed, kept, partial};

/// Tokens of the prompt, then before and after the move.
const PROMPT: u64 = 700;
const BEFORE: u64 = 12;
const AFTER: u64 = 24;
/// Pages that a session of that length takes.
const PAGES: u32 = (PROMPT + BEFORE + AFTER).div_ceil(PAGE) as u32;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (model, device, dtype, contexts) = match words.as_slice() {
        [model, device @ ("cpu" | "cuda"), dtype @ ("fp32" | "bf16")] => (model, device, dtype, None),
        [model, device @ ("cpu" | "cuda"), dtype @ ("fp32" | "bf16"), "answering", contexts @ ..] => {
            (model, device, dtype, Some(contexts))
        }
        _ => {
            eprintln!("usage: moved MODEL cpu|cuda fp32|bf16 [answering CONTEXT...]");
            return ExitCode::from(2);
        }
    };
    let precision = if *dtype == "fp32" { DType::Fp32 } else { DType::Bf16 };
    let done = match *device {
        "cpu" => run(model, precision, contexts, || Ok(cpu(precision))),
        _ => on_card(model, precision, contexts),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("moved: {error}");
            ExitCode::FAILURE
        }
    }
}

fn cpu(activation: DType) -> perigee_cpu::CpuBackend {
    perigee_cpu::CpuBackend::new(perigee_cpu::CpuOptions { activation, threads: 2 }, Box::new(Solo)).running_ahead()
}

#[cfg(feature = "cuda")]
fn on_card(model: &str, precision: DType, contexts: Option<&[&str]>) -> Outcome<()> {
    run(model, precision, contexts, || {
        let options = perigee_cuda::Options { device: 0, precision };
        Ok(perigee_cuda::CudaBackend::open(options, Box::new(Solo))?)
    })
}

#[cfg(not(feature = "cuda"))]
fn on_card(_: &str, _: DType, _: Option<&[&str]>) -> Outcome<()> {
    perigee_cuda::check(0)?;
    Ok(())
}

fn run<B: Backend + 'static>(
    model: &str,
    precision: DType,
    contexts: Option<&[&str]>,
    open: impl Fn() -> Outcome<B>,
) -> Outcome<()> {
    let source = WeightSource::open(&ModelSpec::parse(model)?)?;
    let Some(contexts) = contexts else { return moved((model, &source), precision, open) };
    let contexts = contexts.iter().map(|context| context.parse()).collect::<Result<Vec<u64>, _>>()?;
    answering::measure(&source, &contexts, open()?)
}

/// Slot and pages of a session with everything at one replica.
fn at_home(slot: u32) -> Seat {
    let pages = (slot * PAGES..(slot + 1) * PAGES).collect();
    Seat { slots: (slot, slot), first: 0, pages, remote: Default::default() }
}

fn moved<B: Backend + 'static>(
    (model, source): (&str, &WeightSource),
    precision: DType,
    open: impl Fn() -> Outcome<B>,
) -> Outcome<()> {
    let mut home = Replica::open(open()?, source, 3 * PAGES as usize, None, false)?;
    let answers = home.home()?;
    let mut away = Replica::open(open()?, source, PAGES as usize, Some(&answers), false)?;
    let vocab = home.vocab as u64;
    let text: Vec<u32> = (1..=PROMPT + BEFORE + AFTER).map(|at| (at * 2_654_435_761 % vocab) as u32).collect();
    let (prompt, rest) = text.split_at(PROMPT as usize);
    let steps = |range: std::ops::Range<u64>| range.map(|at| (PROMPT + at, &rest[at as usize..][..1], at as usize));

    // The experts of an undisturbed run, and its logits with these forced.
    let mut experts = home.begin(&at_home(0), prompt, &[])?;
    let prompt_experts = std::mem::take(&mut experts);
    for (position, token, _) in steps(0..BEFORE + AFTER) {
        experts.push(home.traced(&fed(&at_home(0), position, token), &ForcedExperts::new())?.1);
    }
    let mut expected = Vec::new();
    home.begin(&at_home(1), prompt, &prompt_experts)?;
    for (position, token, at) in steps(0..BEFORE + AFTER) {
        expected.push(home.traced(&fed(&at_home(1), position, token), &experts[at])?.0);
    }

    let mut before = Vec::new();
    home.begin(&at_home(2), prompt, &prompt_experts)?;
    for (position, token, at) in steps(0..BEFORE) {
        let logits = home.traced(&fed(&at_home(2), position, token), &experts[at])?.0;
        before.push(off(&logits, &expected[at]));
    }
    let context = PROMPT + BEFORE;
    let mut seat = arrive(&mut home, &mut away, &answers, context)?;
    let mut after = Vec::new();
    for (position, token, at) in steps(BEFORE..BEFORE + AFTER) {
        let logits = away.traced(&answered(&mut seat, position, token), &experts[at])?.0;
        after.push(off(&logits, &expected[at]));
    }
    let limit = if precision == DType::Fp32 { 1e-5 } else { 4e-2 };
    let (worst_before, worst_after) = (most(&before), most(&after));
    println!(
        "{model} {precision:?}: digests equal; logits off by {worst_before:.1e} before the move and {worst_after:.1e} after it (limit {limit:.0e})"
    );
    if !(worst_before <= limit && worst_after <= limit) {
        return Err("the logits are others".into());
    }

    // A device records these, which must not change what they give; experts are free.
    let mut pieces = Vec::new();
    for is_recorded in [false, true] {
        let mut seat = arrive(&mut home, &mut away, &answers, context)?;
        let mut logits = Vec::new();
        for (position, token, _) in steps(BEFORE..BEFORE + AFTER) {
            let plan = answered(&mut seat, position, token);
            logits.push(match is_recorded {
                true => away.ranks.step(&plan, &[], true)?.logits.unwrap_or_default(),
                false => away.traced(&plan, &ForcedExperts::new())?.0,
            });
        }
        pieces.push(logits);
    }
    let apart: Vec<f32> = pieces[0].iter().zip(&pieces[1]).map(|(single, piece)| off(piece, single)).collect();
    println!("{model} {precision:?}: steps in pieces off by {:.1e} from op by op (limit {limit:.0e})", most(&apart));
    if most(&apart) <= limit { Ok(()) } else { Err("steps in pieces give others".into()) }
}

/// Brings the session from slot 2 of its home to slot 0 of the other; its full pages stay.
fn arrive<B: Backend>(home: &mut Replica<B>, away: &mut Replica<B>, answers: &Home, context: u64) -> Outcome<Seat> {
    let from = at_home(2);
    let full = (context / PAGE) as usize;
    let state = home.ranks.export_slot(StateSource::Slot(from.slots.0))?;
    away.ranks.import_state(0, &state)?;
    let spans = [partial(from.pages[full], context)];
    let pages = home.ranks.export_pages(&spans)?;
    away.ranks.import_pages(&pages.into_iter().map(|slice| (0, slice)).collect::<Vec<_>>())?;
    let state = [home.ranks.digest_slot(from.slots.0)?, away.ranks.digest_slot(0)?];
    let latents = [home.ranks.digest_pages(&spans)?, away.ranks.digest_pages(&[partial(0, context)])?];
    if state[0] != state[1] || latents[0] != latents[1] {
        return Err(format!("other bits arrived: {state:?}, {latents:?}").into());
    }
    answers.directory.publish(SESSION, kept(&from.pages[..full]), 2);
    let first = full as u64 * PAGE;
    Ok(Seat { slots: (0, 1), first, pages: (0..PAGES).collect(), remote: asks(full as u64) })
}

/// The session's next step, which counts.
fn answered(seat: &mut Seat, position: u64, token: &[u32]) -> StepPlan {
    let plan = fed(seat, position, token);
    seat.slots = (seat.slots.1, seat.slots.0);
    plan
}

/// Relative L2.
fn off(found: &[f32], expected: &[f32]) -> f32 {
    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|value| value * value).sum::<f32>().sqrt();
    let apart = norm(&mut found.iter().zip(expected).map(|(found, expected)| found - expected));
    if found.len() == expected.len() { apart / norm(&mut expected.iter().copied()) } else { f32::INFINITY }
}

/// The largest; not a number where one is none.
fn most(values: &[f32]) -> f32 {
    values.iter().copied().fold(0.0, |most, value| if value > most || value.is_nan() { value } else { most })
}
