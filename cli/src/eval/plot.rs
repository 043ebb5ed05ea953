//! Plots as SVG, drawn here so that a report needs no other program.

use crate::plots::escape;
use std::fmt::Write;

/// A point of a line, with the ends of its interval.
#[derive(Clone, Copy, Debug)]
pub struct Point {
    /// Where on the x axis.
    pub x: f64,
    /// Where on the y axis.
    pub y: f64,
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// Points with one name.
#[derive(Clone, Debug)]
pub struct Line {
    /// What the legend says.
    pub name: String,
    /// In order of x.
    pub points: Vec<Point>,
}

/// What stands around the lines.
pub struct Axes<'a> {
    /// Above the plot.
    pub title: &'a str,
    /// Below the x axis, which is logarithmic.
    pub x: &'a str,
    /// Beside the y axis.
    pub y: &'a str,
    /// Words for a number on the x axis.
    pub tick: fn(f64) -> String,
}

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 240.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 56.0;
/// Colours that people with colour blindness can tell apart (Okabe and Ito, 2008).
const COLOURS: [&str; 8] = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999",
];

fn begin(out: &mut String, title: &str) {
    let _ = write!(
        out,
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">
<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>
<text x="{LEFT}" y="22" font-size="14">{}</text>
"##,
        escape(title)
    );
}

fn y_axis(out: &mut String, name: &str, top: f64, tick: impl Fn(f64) -> String) {
    let (bottom, right) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
    for i in 0..=5 {
        let share = f64::from(i) / 5.0;
        let y = bottom - share * (bottom - TOP);
        let _ = write!(
            out,
            r##"<line x1="{LEFT}" y1="{y:.1}" x2="{right}" y2="{y:.1}" stroke="#dddddd"/>
<text x="{:.1}" y="{:.1}" text-anchor="end">{}</text>
"##,
            LEFT - 6.0,
            y + 4.0,
            escape(&tick(share * top))
        );
    }
    let middle = (TOP + bottom) / 2.0;
    let _ = writeln!(
        out,
        r##"<text x="16" y="{middle:.1}" text-anchor="middle" transform="rotate(-90 16 {middle:.1})">{}</text>"##,
        escape(name)
    );
}

/// Lines over a logarithmic x axis; y from 0 to 1.
pub fn lines(axes: &Axes<'_>, lines: &[Line]) -> String {
    let mut out = String::new();
    begin(&mut out, axes.title);
    y_axis(&mut out, axes.y, 1.0, |v| format!("{v:.1}"));
    let all = || lines.iter().flat_map(|l| &l.points).map(|p| p.x.max(1.0));
    let low = all().fold(f64::INFINITY, f64::min);
    let high = all().fold(0.0, f64::max);
    // Room at both sides, and a range even if there is one x only.
    let (low, high) = match low.is_finite() {
        true => (low / 1.3, high * 1.3),
        false => (1.0, 10.0),
    };
    let (bottom, right) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
    let at = |x: f64| {
        let share = (x.max(1.0) / low).ln() / (high / low).ln();
        LEFT + share * (right - LEFT)
    };
    let up = |y: f64| bottom - y.clamp(0.0, 1.0) * (bottom - TOP);
    let mut power = low.log2().ceil() as i32;
    let step = (((high / low).log2() / 7.0).ceil() as i32).max(1);
    while f64::from(power) <= high.log2() {
        let value = f64::from(power).exp2();
        let x = at(value);
        let _ = write!(
            out,
            r##"<line x1="{x:.1}" y1="{TOP}" x2="{x:.1}" y2="{bottom}" stroke="#eeeeee"/>
<text x="{x:.1}" y="{:.1}" text-anchor="middle">{}</text>
"##,
            bottom + 16.0,
            escape(&(axes.tick)(value))
        );
        power += step;
    }
    let _ = writeln!(
        out,
        r##"<text x="{:.1}" y="{:.1}" text-anchor="middle">{}</text>"##,
        (LEFT + right) / 2.0,
        HEIGHT - 14.0,
        escape(axes.x)
    );
    for (i, line) in lines.iter().enumerate() {
        let colour = COLOURS[i % COLOURS.len()];
        let path: Vec<String> = (line.points.iter())
            .map(|p| format!("{:.1},{:.1}", at(p.x), up(p.y)))
            .collect();
        if path.len() > 1 {
            let _ = writeln!(
                out,
                r##"<polyline points="{}" fill="none" stroke="{colour}" stroke-width="2"/>"##,
                path.join(" ")
            );
        }
        for p in &line.points {
            let (x, y) = (at(p.x), up(p.y));
            let _ = write!(
                out,
                r##"<line x1="{x:.1}" y1="{:.1}" x2="{x:.1}" y2="{:.1}" stroke="{colour}"/>
<circle cx="{x:.1}" cy="{y:.1}" r="4" fill="{colour}"/>
"##,
                up(p.low),
                up(p.high)
            );
        }
        legend(&mut out, i, colour, &line.name);
    }
    out.push_str("</svg>\n");
    out
}

fn legend(out: &mut String, i: usize, colour: &str, name: &str) {
    let (x, y) = (WIDTH - RIGHT + 14.0, TOP + 8.0 + 18.0 * i as f64);
    // The legend column has room for about 34 letters.
    let short: String = match name.chars().count() > 34 {
        true => name.chars().take(33).chain(['…']).collect(),
        false => name.into(),
    };
    let _ = write!(
        out,
        r##"<rect x="{x:.1}" y="{:.1}" width="10" height="10" fill="{colour}"/>
<text x="{:.1}" y="{:.1}">{}</text>
"##,
        y - 9.0,
        x + 16.0,
        y,
        escape(&short)
    );
}

/// Groups of bars, one bar per name in each: rates inside facts and inside filler.
pub fn bars(title: &str, y: &str, names: &[&str], groups: &[(String, Vec<f64>)]) -> String {
    let mut out = String::new();
    begin(&mut out, title);
    let values = || groups.iter().flat_map(|(_, v)| v).copied();
    let top = values().fold(0.0, f64::max).max(1e-9) * 1.1;
    y_axis(&mut out, y, top, |v| format!("{v:.0}"));
    let (bottom, right) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
    let room = (right - LEFT) / groups.len().max(1) as f64;
    let width = room * 0.8 / names.len().max(1) as f64;
    for (g, (group, values)) in groups.iter().enumerate() {
        let left = LEFT + room * (g as f64 + 0.1);
        for (i, value) in values.iter().enumerate() {
            let height = value / top * (bottom - TOP);
            let _ = writeln!(
                out,
                r##"<rect x="{:.1}" y="{:.1}" width="{:.1}" height="{height:.1}" fill="{}"/>"##,
                left + width * i as f64,
                bottom - height,
                width * 0.95,
                COLOURS[i % COLOURS.len()]
            );
        }
        let short: String = group.chars().take(24).collect();
        let _ = writeln!(
            out,
            r##"<text x="{:.1}" y="{:.1}" text-anchor="middle" font-size="10">{}</text>"##,
            left + room * 0.4,
            bottom + 14.0 + 12.0 * (g % 2) as f64,
            escape(&short)
        );
    }
    for (i, name) in names.iter().enumerate() {
        legend(&mut out, i, COLOURS[i % COLOURS.len()], name);
    }
    out.push_str("</svg>\n");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn axes() -> Axes<'static> {
        Axes {
            title: "a < b & c",
            x: "bytes",
            y: "accuracy",
            tick: |v| format!("{v}"),
        }
    }

    fn point(x: f64, y: f64) -> Point {
        Point {
            x,
            y,
            low: y - 0.1,
            high: y + 0.1,
        }
    }

    #[test]
    fn every_point_and_name_is_drawn() {
        let two = [
            Line {
                name: "nodes:tau=\"1\"".into(),
                points: vec![point(1024.0, 0.9), point(4096.0, 1.0)],
            },
            Line {
                name: "full".into(),
                points: vec![point(65536.0, 1.0)],
            },
        ];
        let svg = lines(&axes(), &two);
        assert_eq!(svg.matches("<circle").count(), 3);
        assert_eq!(svg.matches("<polyline").count(), 1);
        assert!(svg.contains("a &lt; b &amp; c") && svg.contains("tau=&quot;1&quot;"));
        assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"));
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
        // Better answers stand higher: y grows downwards.
        let y = |n: usize| -> f64 {
            let at = svg.match_indices("cy=\"").nth(n).unwrap().0 + 4;
            svg[at..].split('"').next().unwrap().parse().unwrap()
        };
        assert!(y(1) < y(0) && y(1) == y(2));
    }

    #[test]
    fn empty_and_odd_values_do_no_harm() {
        for svg in [
            lines(&axes(), &[]),
            bars("t", "y", &["facts"], &[]),
            lines(
                &axes(),
                &[Line {
                    name: "n".into(),
                    points: vec![point(0.0, 0.0), point(0.0, 2.0)],
                }],
            ),
            bars("t", "y", &["a", "b"], &[("g".into(), vec![0.0, 0.0])]),
        ] {
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
        let two = bars("t", "y", &["a", "b"], &[("g".into(), vec![2.0, 4.0])]);
        assert_eq!(two.matches("<rect").count(), 1 + 2 + 2);
    }
}
