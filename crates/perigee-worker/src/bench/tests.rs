//! The small form on CPUs: every figure is there and consistent, and what cannot be measured is refused.

use clap::Parser;

use super::*;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    engine: EngineOptions,
}

fn request(cells: &[(usize, usize)], steps: usize) -> BenchRequest {
    let engine = Line::parse_from(["bench", "--model=random:tiny", "--threads=1"]).engine;
    let cells = cells.iter().map(|&(batch, context)| Cell { batch, context }).collect();
    BenchRequest { engine, cells, steps, bandwidth: None, beside: None }
}

#[test]
fn a_grid_on_cpus_gives_every_figure() {
    let mut told = Vec::new();
    let results = run(&request(&[(1, 40), (3, 130), (20, 30)], 4), &mut |result| told.push(result.clone())).unwrap();
    assert_eq!(results, told);
    assert_eq!(results.iter().map(|r| (r.batch, r.context)).collect::<Vec<_>>(), [(1, 40), (3, 130), (20, 30)]);
    for result in &results {
        assert_eq!((result.device.as_str(), result.model.as_str()), ("cpu", "random:tiny@0"));
        assert!(result.steps >= 4, "{result:?}");
        assert!(result.ttft_s > 0.0 && result.tpot_ms > 0.0 && result.floor_ms > 0.0, "{result:?}");
        assert!((result.floor_ratio - result.tpot_ms / result.floor_ms).abs() < 1e-9, "{result:?}");
        assert!((result.decode_tok_s * result.tpot_ms - result.batch as f64 * 1e3).abs() < 1e-6, "{result:?}");
    }
    // A token has top_k experts; a batch has between that and all.
    let moe = &perigee_model::Preset::Tiny.config().unwrap().moe;
    let top_k = moe.top_k as f64;
    assert!((results[0].experts_touched - top_k).abs() < 1e-9, "{}", results[0].experts_touched);
    for result in &results {
        assert!((top_k..=moe.experts as f64).contains(&result.experts_touched), "{result:?}");
    }
    assert!(results[2].experts_touched > top_k);
}

#[test]
fn a_single_step_is_enough() {
    assert!(run(&request(&[(2, 8)], 1), &mut |_| {}).unwrap()[0].steps >= 1);
}

#[test]
fn a_bandwidth_that_is_given_is_used() {
    let request = BenchRequest { bandwidth: Some(4e12), ..request(&[(1, 8)], 2) };
    let result = run(&request, &mut |_| {}).unwrap().remove(0);
    assert!((result.bandwidth_tb_s - 4.0).abs() < 1e-12);
    let model = perigee_model::Preset::Tiny.config().unwrap();
    let bytes = step_bytes(&model, request.cells[0], result.experts_touched, perigee_backend::DType::Fp32);
    assert!((result.floor_ms - bytes / 4e9).abs() < 1e-12);
}

#[test]
fn a_prompt_is_computed_beside_sessions_that_decode() {
    for slowdown in [None, Some(2.0)] {
        let mut request = BenchRequest { beside: Some(700), ..request(&[(2, 40)], 4) };
        request.engine.prompt_slowdown = slowdown;
        let beside = run(&request, &mut |_| {}).unwrap()[0].beside.unwrap();
        assert_eq!(beside.prompt, 700);
        assert!(beside.alone_ms > 0.0 && beside.beside_ms > 0.0 && beside.prompt_tok_s > 0.0, "{beside:?}");
        assert!(beside.longest_ms >= beside.beside_ms, "{beside:?}");
    }
}

#[test]
fn nothing_to_measure_is_refused() {
    for (cells, steps) in [(&[][..], 4), (&[(0, 8)], 4), (&[(1, 0)], 4), (&[(1, 8)], 0)] {
        let error = run(&request(cells, steps), &mut |_| {}).unwrap_err().to_string();
        assert!(error.contains("at least"), "{error}");
    }
}

#[test]
fn sizes_are_what_the_largest_cells_need() {
    let options = sized(&request(&[(1, 1000), (40, 64)], 16)).unwrap();
    assert_eq!((options.max_batch, options.state_slots), (Some(40), 40));
    assert!(options.latent_pages >= Some(80) && options.max_model_len >= Some(1017), "{options:?}");
}
