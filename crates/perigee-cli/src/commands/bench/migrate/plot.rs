//! The stalls of a run as a plot.

use perigee_load::report::plot::{Line, Plot, STYLE, Scale};

use super::Row;

/// Height of one plot with its labels, as it renders itself.
const HEIGHT: usize = 280;

/// Two plots in one file: split moves beside whole copies, and all three, because a replay is of another order.
pub(super) fn svg(rows: &[Row]) -> String {
    let first = rows.iter().map(|row| row.context).min().unwrap_or(1).max(1);
    let line = |mode: &'static str| Line {
        name: mode,
        points: rows
            .iter()
            .filter(|row| row.mode == mode)
            .map(|row| [row.context as f64, row.stall_ms.max(0.0)])
            .collect(),
    };
    let plot = |title: &str, modes: &[&'static str]| {
        let lines = modes.iter().copied().map(line).collect();
        let x_scale = Scale::Log { from: first as f64 };
        Plot { title, x_label: "tokens of context", x_scale, lines, uprights: Vec::new() }.render()
    };
    let plots = [
        plot("stall of a move, ms", &["split", "whole"]),
        plot("the same beside a replay, ms", &["split", "whole", "replay"]),
    ];
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 800 {}\"><style>{STYLE} svg{{font-family:sans-serif}}</style>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n",
        plots.len() * HEIGHT
    );
    for (index, plot) in plots.iter().enumerate() {
        let place = format!("<svg y=\"{}\" height=\"{HEIGHT}\" viewBox", index * HEIGHT);
        svg.push_str(&plot.replacen("<svg viewBox", &place, 1));
    }
    svg.push_str("</svg>\n");
    svg
}
