//! `tagvisor tags map`: a picture of memory by tag.

use std::fs::File;
use std::io::{self, BufWriter, IsTerminal};
use std::path::PathBuf;

use clap::{Args as ClapArgs, ValueEnum};
use inspect::{Colours, Grid, draw, write_png};

use super::super::Result;
use super::super::addresses::Addresses;
use super::super::target::TargetArgs;
use super::{finished, lines};

/// Cells of a row and rows of a picture, at most.
const PNG_CELLS: usize = 512;
/// What a terminal shows beside the map.
const LABEL_COLUMNS: usize = 16;

/// Which memory, and where the picture goes.
#[derive(ClapArgs)]
pub struct Args {
    #[command(flatten)]
    target: TargetArgs,
    #[command(flatten)]
    addresses: Addresses,
    /// Write the picture to this file, not to the terminal
    #[arg(long, value_name = "FILE")]
    png: Option<PathBuf>,
    /// What the terminal can show [default: what it says that it can]
    #[arg(long, value_enum, value_name = "COLOURS")]
    colour: Option<Colour>,
    /// Cells of a row: a power of two [default: what fits]
    #[arg(long, value_name = "CELLS", value_parser = clap::value_parser!(u16).range(1..=512))]
    width: Option<u16>,
    /// Rows at most [default: what fits]
    #[arg(long, value_name = "CELLS", value_parser = clap::value_parser!(u16).range(2..=512))]
    height: Option<u16>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Colour {
    /// All colours
    True,
    /// The 256 colours of xterm
    #[value(name = "256")]
    Indexed,
    /// Hexadecimal digits
    None,
}

pub fn map(args: &Args) -> Result {
    let mut target = args.target.open()?;
    let mut memory = target.memory();
    let mut view = args.addresses.view(&mut *memory)?;
    let colours = colours(args);
    let (width, height) = match &args.png {
        Some(_) => (PNG_CELLS, PNG_CELLS),
        None => terminal_cells(colours),
    };
    let width = args.width.map_or(width, usize::from);
    let height = args.height.map_or(height, usize::from);
    let grid = Grid::of(&mut view, width, height)?;
    let Some(path) = &args.png else {
        let mut out = lines();
        draw(&grid, colours, &mut out)?;
        return finished(out);
    };
    let range = view.range();
    let title = format!("memory tags, {:#x} to {:#x}", range.start, range.end);
    let failed = |e: &dyn std::error::Error| format!("picture {}: {e}", path.display());
    let file = File::create(path).map_err(|e| failed(&e))?;
    let mut out = BufWriter::new(file);
    write_png(&grid, &title, &mut out).map_err(|e| failed(&e))?;
    finished(out)
}

/// What the terminal says of itself (`COLORTERM`, `NO_COLOR`); what is no terminal gets digits.
fn colours(args: &Args) -> Colours {
    let variable = |name| std::env::var(name).unwrap_or_default();
    match args.colour {
        Some(Colour::True) => Colours::True,
        Some(Colour::Indexed) => Colours::Indexed,
        Some(Colour::None) => Colours::None,
        None if !io::stdout().is_terminal() || !variable("NO_COLOR").is_empty() => Colours::None,
        None if ["truecolor", "24bit"].contains(&variable("COLORTERM").as_str()) => Colours::True,
        None => Colours::Indexed,
    }
}

/// Cells that fit, in width and height.
fn terminal_cells(colours: Colours) -> (usize, usize) {
    let size = rustix::termios::tcgetwinsize(io::stdout()).ok();
    let size = size.filter(|size| size.ws_col > 0 && size.ws_row > 0);
    let (columns, lines) = size.map_or((96, 40), |size| {
        (usize::from(size.ws_col), usize::from(size.ws_row))
    });
    let fits = columns.saturating_sub(LABEL_COLUMNS).clamp(16, 512);
    // The largest power of two that is not greater.
    let width = 1 << fits.ilog2();
    let lines = lines.saturating_sub(3).clamp(4, 256);
    match colours {
        Colours::None => (width, lines),
        Colours::True | Colours::Indexed => (width, 2 * lines),
    }
}
