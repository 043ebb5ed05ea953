//! Line charts as SVG, small enough to read as text.

use std::fmt::Write;

/// One line of a chart.
pub struct Line {
    /// Its name in the legend.
    pub name: String,
    /// Points in order of x.
    pub points: Vec<(f64, f64)>,
}

/// A chart.
pub struct Plot {
    /// Over it.
    pub title: String,
    /// Under it.
    pub x_label: String,
    /// Beside it.
    pub y_label: String,
    /// Whether x is drawn by its logarithm (values below 1 are drawn as 1).
    pub log_x: bool,
    /// Whether y starts at 0; else at the least value.
    pub from_zero: bool,
    /// The lines.
    pub lines: Vec<Line>,
}

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 360.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 180.0;
const TOP: f64 = 36.0;
const BOTTOM: f64 = 48.0;
/// Okabe and Ito's colours, told apart by everyone.
const COLOURS: &[&str] = &[
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000",
];

/// `text` with what SVG and HTML would read as markup written out.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c => out.push(c),
        }
    }
    out
}

/// Charts below each other in one file.
pub fn page(plots: &[Plot]) -> String {
    let height = HEIGHT * plots.len() as f64;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    for (i, plot) in plots.iter().enumerate() {
        let _ = writeln!(
            out,
            "<g transform=\"translate(0 {})\">\n{}</g>",
            HEIGHT * i as f64,
            plot.group()
        );
    }
    out + "</svg>\n"
}

impl Plot {
    fn x(&self, x: f64) -> f64 {
        if self.log_x { x.max(1.0).log2() } else { x }
    }

    /// The chart without the surrounding `svg` element.
    fn group(&self) -> String {
        let points = || self.lines.iter().flat_map(|l| &l.points);
        let (mut x0, mut x1) = bounds(points().map(|p| self.x(p.0)));
        let (mut y0, mut y1) = bounds(points().map(|p| p.1));
        if self.from_zero {
            y0 = y0.min(0.0);
        }
        widen(&mut x0, &mut x1);
        widen(&mut y0, &mut y1);
        let (w, h) = (WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM);
        let px = |x: f64| LEFT + (self.x(x) - x0) / (x1 - x0) * w;
        let py = |y: f64| TOP + h - (y - y0) / (y1 - y0) * h;
        let mut out = format!(
            "<text x=\"{LEFT}\" y=\"20\" font-size=\"14\" font-weight=\"bold\">{}</text>\n",
            escape(&self.title)
        );
        for y in ticks(y0, y1) {
            let at = py(y);
            let _ = writeln!(
                out,
                "<path d=\"M{LEFT} {at:.1}h{w}\" stroke=\"#ddd\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                LEFT - 6.0,
                at + 4.0,
                label(y)
            );
        }
        for x in self.x_ticks(x0, x1) {
            let at = px(x);
            let _ = writeln!(
                out,
                "<path d=\"M{at:.1} {:.1}v4\" stroke=\"black\"/>\
                 <text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                TOP + h,
                TOP + h + 17.0,
                label(x)
            );
        }
        let _ = writeln!(
            out,
            "<path d=\"M{LEFT} {TOP}v{h}h{w}\" fill=\"none\" stroke=\"black\"/>\n\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\n\
             <text transform=\"translate(16 {:.1}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
            LEFT + w / 2.0,
            HEIGHT - 10.0,
            escape(&self.x_label),
            TOP + h / 2.0,
            escape(&self.y_label)
        );
        for (i, line) in self.lines.iter().enumerate() {
            let colour = COLOURS[i % COLOURS.len()];
            let path: Vec<String> = line
                .points
                .iter()
                .map(|&(x, y)| format!("{:.1},{:.1}", px(x), py(y)))
                .collect();
            let _ = writeln!(
                out,
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
                path.join(" ")
            );
            for &(x, y) in &line.points {
                let _ = writeln!(
                    out,
                    "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\" fill=\"{colour}\">\
                     <title>{}: {} at {}</title></circle>",
                    px(x),
                    py(y),
                    escape(&line.name),
                    label(y),
                    label(x)
                );
            }
            let at = TOP + 8.0 + 18.0 * i as f64;
            let _ = writeln!(
                out,
                "<path d=\"M{:.1} {at:.1}h18\" stroke=\"{colour}\" stroke-width=\"2\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                LEFT + w + 12.0,
                LEFT + w + 36.0,
                at + 4.0,
                escape(&line.name)
            );
        }
        out
    }

    fn x_ticks(&self, x0: f64, x1: f64) -> Vec<f64> {
        if !self.log_x {
            return ticks(x0, x1);
        }
        let step = ((x1 - x0) / 8.0).ceil().max(1.0);
        let mut at = x0.ceil();
        let mut out = Vec::new();
        while at <= x1 + 1e-9 {
            out.push(at.exp2());
            at += step;
        }
        out
    }
}

/// Least and greatest of the finite values, (0, 1) without any.
fn bounds(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (lo, hi) = values
        .filter(|v| v.is_finite())
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(lo, hi), v| {
            (lo.min(v), hi.max(v))
        });
    if lo <= hi { (lo, hi) } else { (0.0, 1.0) }
}

/// Gives a range without extent one.
fn widen(lo: &mut f64, hi: &mut f64) {
    if *hi - *lo < 1e-12 {
        *hi += 1.0;
        *lo -= if *lo > 0.5 { 0.5 } else { 0.0 };
    }
}

/// About five round numbers between `lo` and `hi`.
fn ticks(lo: f64, hi: f64) -> Vec<f64> {
    let raw = (hi - lo) / 5.0;
    let power = 10f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .map(|m| m * power)
        .into_iter()
        .find(|s| *s >= raw)
        .unwrap_or(raw);
    let mut out = Vec::new();
    let mut i = (lo / step).ceil();
    while i * step <= hi + step * 1e-6 && out.len() < 32 {
        out.push(i * step);
        i += 1.0;
    }
    out
}

/// A number with as many digits as one can use; thousands and more as `16k`.
fn label(x: f64) -> String {
    let short = |x: f64| {
        let text = format!("{x:.3}");
        let text = text.trim_end_matches('0').trim_end_matches('.');
        match text {
            "" | "-0" => "0".to_owned(),
            text => text.to_owned(),
        }
    };
    match x.abs() {
        a if a >= 1024.0 && x % 1024.0 == 0.0 => format!("{}k", short(x / 1024.0)),
        a if a >= 10_000.0 => format!("{}k", short(x / 1000.0)),
        _ => short(x),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plot(points: Vec<(f64, f64)>, log_x: bool) -> Plot {
        Plot {
            title: "a < b".into(),
            x_label: "x".into(),
            y_label: "y".into(),
            log_x,
            from_zero: true,
            lines: vec![Line {
                name: "\"full\"".into(),
                points,
            }],
        }
    }

    #[test]
    fn every_input_gives_finite_coordinates_and_clean_text() {
        for points in [
            vec![],
            vec![(0.0, 0.0)],
            vec![(1024.0, 5.0)],
            vec![(0.0, 10.0), (4096.0, 8.0), (131_072.0, 1.0)],
            vec![(1.0, 1e-9), (2.0, 1e12)],
        ] {
            for log_x in [false, true] {
                let svg = page(&[plot(points.clone(), log_x)]);
                assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
                assert!(svg.contains("a &lt; b") && svg.contains("&quot;full&quot;"));
                assert_eq!(svg.matches("<circle").count(), points.len());
            }
        }
    }

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(ticks(0.0, 10.0), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(ticks(3.0, 4.2).len(), 3);
        assert_eq!(label(16384.0), "16k");
        assert_eq!(label(0.25), "0.25");
    }
}
