//! Line plots as SVG, for pages that load nothing. A page that has some needs [`STYLE`].

use std::fmt::Write;

/// Rules for a page's style sheet, without which plots have no lines.
pub const STYLE: &str = "svg{width:100%;font-size:11px}.title{font-weight:bold;font-size:13px}\
.grid{stroke:#e4e4e4;fill:none}.line{fill:none;stroke-width:1.5}.upright{fill:none;stroke-width:1;opacity:.7}\
.x{text-anchor:middle;fill:#666}.y{text-anchor:end;fill:#666}";

/// Inner size, in user units.
const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 220.0;
/// Room for labels.
const LEFT: f64 = 60.0;
const TOP: f64 = 24.0;
const BOTTOM: f64 = 36.0;
/// Colours of lines, distinct for most people with a colour deficiency.
const COLOURS: [&str; 4] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7"];

/// How numbers become places.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scale {
    /// In proportion, from 0 on.
    Linear,
    /// By the logarithm, from a number above 0 on; smaller ones count as that.
    Log {
        /// The left end.
        from: f64,
    },
}

/// A line with its name.
#[derive(Debug, Clone, PartialEq)]
pub struct Line<'a> {
    /// Shown in the line's colour, above the plot.
    pub name: &'a str,
    /// Points [x, y], at least 0, by x.
    pub points: Vec<[f64; 2]>,
}

/// A vertical line where something happened.
#[derive(Debug, Clone, PartialEq)]
pub struct Upright<'a> {
    /// Where, on the x axis.
    pub at: f64,
    /// Its colour, as CSS has it.
    pub colour: &'a str,
    /// What happened; shown when pointed at.
    pub text: &'a str,
}

/// A plot of lines over one x axis; the y axis is linear and begins at 0.
#[derive(Debug, Clone, PartialEq)]
pub struct Plot<'a> {
    /// What is shown, with the unit of y.
    pub title: &'a str,
    /// What x is, with its unit.
    pub x_label: &'a str,
    /// The x axis.
    pub x_scale: Scale,
    /// At most four: they have four colours.
    pub lines: Vec<Line<'a>>,
    /// What happened when.
    pub uprights: Vec<Upright<'a>>,
}

impl Scale {
    fn place(self, value: f64, max: f64) -> f64 {
        match self {
            Self::Linear => value / max,
            Self::Log { from } => (value.max(from) / from).ln() / (max / from).ln().max(f64::MIN_POSITIVE),
        }
    }

    fn ticks(self, max: f64) -> Vec<f64> {
        match self {
            Self::Linear => {
                let raw = max / 6.0;
                let power = 10f64.powf(raw.log10().floor());
                let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|step| step * power).find(|step| *step >= raw);
                let step = step.unwrap_or(raw);
                (0..=(max / step) as usize).map(|count| count as f64 * step).collect()
            }
            Self::Log { from } => {
                std::iter::successors(Some(from), |tick| Some(tick * 10.0)).take_while(|tick| *tick <= max).collect()
            }
        }
    }
}

impl Plot<'_> {
    /// As an svg element.
    pub fn render(&self) -> String {
        let points = || self.lines.iter().flat_map(|line| &line.points);
        // An axis without any extent ends at 1.
        let largest = |axis: usize| match points().map(|point| point[axis]).fold(0.0, f64::max) {
            0.0 => 1.0,
            largest => largest,
        };
        let least = if let Scale::Log { from } = self.x_scale { from * 10.0 } else { 0.0 };
        let (x_max, y_max) = (largest(0).max(least), largest(1));
        let x = |value: f64| LEFT + WIDTH * self.x_scale.place(value, x_max).clamp(0.0, 1.0);
        let y = |value: f64| TOP + HEIGHT * (1.0 - value / y_max);
        let mut svg = format!(
            "<svg viewBox=\"0 0 {} {}\" role=\"img\"><title>{}</title>\n",
            LEFT + WIDTH + 20.0,
            TOP + HEIGHT + BOTTOM,
            escape(self.title)
        );
        // Writing into a string does not fail.
        let _ = writeln!(svg, "<text x=\"{LEFT}\" y=\"14\" class=\"title\">{}</text>", escape(self.title));
        for tick in self.x_scale.ticks(x_max) {
            let (at, bottom) = (x(tick), TOP + HEIGHT);
            let _ = writeln!(svg, "<path d=\"M{at:.1} {TOP}V{bottom}\" class=\"grid\"/>");
            let _ = writeln!(svg, "<text x=\"{at:.1}\" y=\"{:.1}\" class=\"x\">{}</text>", bottom + 14.0, short(tick));
        }
        for tick in Scale::Linear.ticks(y_max) {
            let at = y(tick);
            let _ = writeln!(svg, "<path d=\"M{LEFT} {at:.1}H{}\" class=\"grid\"/>", LEFT + WIDTH);
            let _ =
                writeln!(svg, "<text x=\"{}\" y=\"{:.1}\" class=\"y\">{}</text>", LEFT - 6.0, at + 4.0, short(tick));
        }
        let (label_x, label_y) = (LEFT + WIDTH / 2.0, TOP + HEIGHT + BOTTOM - 6.0);
        let _ = writeln!(svg, "<text x=\"{label_x}\" y=\"{label_y}\" class=\"x\">{}</text>", escape(self.x_label));
        for upright in &self.uprights {
            let (at, bottom, colour) = (x(upright.at), TOP + HEIGHT, upright.colour);
            let path = format!("<path d=\"M{at:.1} {TOP}V{bottom}\" stroke=\"{colour}\" class=\"upright\">");
            let _ = writeln!(svg, "{path}<title>{}</title></path>", escape(upright.text));
        }
        for (index, line) in self.lines.iter().enumerate() {
            let colour = COLOURS[index % COLOURS.len()];
            let path: Vec<String> =
                line.points.iter().map(|point| format!("{:.1},{:.1}", x(point[0]), y(point[1]))).collect();
            let _ = writeln!(svg, "<polyline points=\"{}\" stroke=\"{colour}\" class=\"line\"/>", path.join(" "));
            let at = LEFT + WIDTH - 110.0 * (self.lines.len() - index) as f64 + 20.0;
            let _ = writeln!(svg, "<text x=\"{at}\" y=\"14\" fill=\"{colour}\">{}</text>", escape(line.name));
        }
        svg.push_str("</svg>\n");
        svg
    }
}

/// A tick's label.
fn short(value: f64) -> String {
    if value >= 1e4 {
        format!("{:.0}k", value / 1e3)
    } else if value >= 10.0 || value == 0.0 {
        format!("{value:.0}")
    } else {
        let text = format!("{value:.3}");
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    }
}

/// Text for HTML and SVG.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_numbers_up_to_the_largest_value() {
        assert_eq!(Scale::Linear.ticks(11.0), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(Scale::Log { from: 1.0 }.ticks(2500.0), [1.0, 10.0, 100.0, 1000.0]);
        assert_eq!([short(0.0), short(0.25), short(20_000.0), short(150.0)], ["0", "0.25", "20k", "150"]);
    }

    #[test]
    fn places_are_within_the_frame() {
        let scale = Scale::Log { from: 0.1 };
        assert_eq!((scale.place(0.0, 1000.0), scale.place(1000.0, 1000.0)), (0.0, 1.0));
        assert!((scale.place(10.0, 1000.0) - 0.5).abs() < 1e-9);
        let points = vec![[0.0, 0.0], [5.0, 3.0]];
        let lines = vec![Line { name: "a<b", points }];
        let plot = Plot { title: "t", x_label: "s", x_scale: Scale::Linear, lines, uprights: vec![] };
        let svg = plot.render();
        assert!(svg.contains("points=\"60.0,244.0 780.0,24.0\"") && svg.contains("a&lt;b"), "{svg}");
        let flat = Plot { lines: vec![Line { name: "", points: vec![[0.0, 0.0]] }], ..plot };
        assert!(flat.render().contains("points=\"60.0,244.0\""), "nothing has no extent, and a place all the same");
    }
}
