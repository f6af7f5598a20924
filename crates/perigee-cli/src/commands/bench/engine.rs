//! `perigee bench engine`: the engine in this process; each line is a cell of a grid.

use perigee_worker::EngineOptions;
use perigee_worker::bench::{BenchRequest, Cell, CellResult, run as run_bench};

use crate::commands::at_least_one;

/// Arguments of `bench engine`.
#[derive(clap::Args)]
pub(super) struct EngineArgs {
    /// Sessions that decode together; each with every --context.
    #[arg(long, value_delimiter = ',', default_value = "1,8", value_parser = at_least_one())]
    batch: Vec<usize>,
    /// Tokens of each session's prompt.
    #[arg(long, value_delimiter = ',', default_value = "1024", value_parser = at_least_one())]
    context: Vec<usize>,
    /// Single cells BATCHxCONTEXT instead of a grid.
    #[arg(long, value_delimiter = ',', conflicts_with_all = ["batch", "context"], value_parser = cell)]
    cells: Vec<Cell>,
    /// Decode steps of the whole batch in each cell.
    #[arg(long, default_value_t = 64, value_parser = at_least_one())]
    steps: usize,
    /// Terabytes a second that the floor assumes; by default what a copy on the device reads and writes.
    #[arg(long, value_name = "TB/S")]
    bandwidth: Option<f64>,
    /// After each cell, compute a prompt of so many tokens while the cell's sessions decode: how much later their tokens come then.
    /// Prompts take turns with tokens as --prompt-slowdown says, in the cells too.
    #[arg(long, value_name = "TOKENS", value_parser = at_least_one())]
    beside: Option<usize>,
    /// Print one JSON array: [{device, model, batch, context, ttft_s, prefill_tok_s, tpot_ms, decode_tok_s, experts_touched,
    /// floor_ms, floor_ratio, steps, bandwidth_tb_s, beside: {prompt, alone_ms, beside_ms, longest_ms, prompt_tok_s}}].
    #[arg(long)]
    json: bool,
    /// Sizes follow from the cells; --state-slots, --latent-pages, --max-model-len and --max-batch are not used.
    #[command(flatten)]
    engine: EngineOptions,
}

pub(super) fn run(args: EngineArgs) -> anyhow::Result<()> {
    let cells = if args.cells.is_empty() { grid(&args.batch, &args.context) } else { args.cells };
    let bandwidth = args.bandwidth.map(|rate| rate * 1e12);
    let request = BenchRequest { engine: args.engine, cells, steps: args.steps, bandwidth, beside: args.beside };
    if args.json {
        let results = run_bench(&request, &mut |_| {})?;
        println!("{}", serde_json::to_string(&results)?);
        return Ok(());
    }
    println!("{HEADER}");
    run_bench(&request, &mut |result| println!("{}", line(result)))?;
    Ok(())
}

/// Every batch with every context.
fn grid(batches: &[usize], contexts: &[usize]) -> Vec<Cell> {
    contexts.iter().flat_map(|&context| batches.iter().map(move |&batch| Cell { batch, context })).collect()
}

pub(super) fn cell(text: &str) -> Result<Cell, String> {
    let parsed = text.split_once('x').and_then(|(batch, context)| {
        let cell = Cell { batch: batch.parse().ok()?, context: context.parse().ok()? };
        (cell.batch > 0 && cell.context > 0).then_some(cell)
    });
    parsed.ok_or_else(|| format!("expected BATCHxCONTEXT such as 8x1024, found {text:?}"))
}

const HEADER: &str = "  batch  context   ttft s  prefill tok/s   tpot ms  decode tok/s  experts  floor ms  ratio";

fn line(result: &CellResult) -> String {
    let beside = result.beside.map_or(String::new(), |beside| {
        format!(
            "\n  beside a prompt of {}: {:.2} ms a token, alone {:.2}: {:.2} times as long, {:.1} ms at most; prompt {:.0} tok/s",
            beside.prompt,
            beside.beside_ms,
            beside.alone_ms,
            beside.beside_ms / beside.alone_ms,
            beside.longest_ms,
            beside.prompt_tok_s
        )
    });
    format!(
        "{:>7}  {:>7}  {:>7.3}  {:>13.0}  {:>8.3}  {:>12.0}  {:>7.1}  {:>8.3}  {:>5.2}{beside}",
        result.batch,
        result.context,
        result.ttft_s,
        result.prefill_tok_s,
        result.tpot_ms,
        result.decode_tok_s,
        result.experts_touched,
        result.floor_ms,
        result.floor_ratio
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_are_read_as_written() {
        assert_eq!(cell("8x1024"), Ok(Cell { batch: 8, context: 1024 }));
        for wrong in ["8", "x", "8x", "0x1", "1x0", "8*9"] {
            assert!(cell(wrong).unwrap_err().contains("BATCHxCONTEXT"), "{wrong}");
        }
    }

    #[test]
    fn a_grid_has_every_pair() {
        let cells = grid(&[1, 8], &[64, 128]);
        assert_eq!(
            cells.iter().map(|c| (c.batch, c.context)).collect::<Vec<_>>(),
            [(1, 64), (8, 64), (1, 128), (8, 128)]
        );
    }
}
