//! The picture as a PNG file, with addresses beside it, a legend and the scale below.

use std::convert::Infallible;
use std::io::{self, Write};

use embedded_graphics::Drawable;
use embedded_graphics::mono_font::MonoTextStyle;
use embedded_graphics::mono_font::ascii::FONT_6X10;
use embedded_graphics::pixelcolor::{Rgb888, RgbColor};
use embedded_graphics::prelude::{DrawTarget, OriginDimensions, Pixel, Point, Primitive, Size};
use embedded_graphics::primitives::{PrimitiveStyle, Rectangle};
use embedded_graphics::text::{Baseline, Text};
use mte::Tag;

use crate::error::{Result, output};
use crate::map::Grid;
use crate::palette::{Colour, HOLE, NO_MEMORY, colour_of, tag_colour};

/// Pixels that the picture has at least in width, if cells can be made larger for it.
const LEAST_WIDTH: u32 = 512;
const MARGIN: u32 = 8;
/// Of a character.
const GLYPH: Size = FONT_6X10.character_size;
/// Between two lines of text.
const LINE: u32 = GLYPH.height + 6;
/// An address of 16 digits.
const LABEL: u32 = 18 * GLYPH.width + MARGIN;
const GROUND: Rgb888 = Rgb888::new(0x10, 0x10, 0x18);

/// Pixels, three bytes each.
struct Canvas {
    size: Size,
    bytes: Vec<u8>,
}

impl OriginDimensions for Canvas {
    fn size(&self) -> Size {
        self.size
    }
}

impl DrawTarget for Canvas {
    type Color = Rgb888;
    type Error = Infallible;

    fn draw_iter<I>(&mut self, pixels: I) -> Result<(), Infallible>
    where
        I: IntoIterator<Item = Pixel<Rgb888>>,
    {
        for Pixel(Point { x, y }, colour) in pixels {
            let inside = (0..self.size.width as i32).contains(&x)
                && (0..self.size.height as i32).contains(&y);
            if inside {
                let at = (y as usize * self.size.width as usize + x as usize) * 3;
                let rgb = [colour.r(), colour.g(), colour.b()];
                self.bytes[at..at + 3].copy_from_slice(&rgb);
            }
        }
        Ok(())
    }
}

impl Canvas {
    fn new(size: Size) -> Self {
        let mut canvas = Self {
            size,
            bytes: vec![0; size.width as usize * size.height as usize * 3],
        };
        let Ok(()) = canvas.clear(GROUND);
        canvas
    }

    fn fill(&mut self, x: u32, y: u32, size: Size, colour: Colour) {
        let [red, green, blue] = colour;
        let style = PrimitiveStyle::with_fill(Rgb888::new(red, green, blue));
        let Ok(()) = Rectangle::new(Point::new(x as i32, y as i32), size)
            .into_styled(style)
            .draw(self);
    }

    fn write(&mut self, x: u32, y: u32, text: &str) {
        let style = MonoTextStyle::new(&FONT_6X10, Rgb888::new(0xd0, 0xd0, 0xd0));
        let at = Point::new(x as i32, y as i32);
        let Ok(_) = Text::with_baseline(text, at, style, Baseline::Top).draw(self);
    }
}

/// Writes a grid as a PNG file. `title` is ASCII text for its head.
///
/// # Errors
/// It cannot be written.
pub fn write_png(grid: &Grid, title: &str, to: impl Write) -> Result<()> {
    let canvas = drawn(grid, title);
    let write = || -> Result<(), png::EncodingError> {
        let mut encoder = png::Encoder::new(to, canvas.size.width, canvas.size.height);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&canvas.bytes)?;
        writer.finish()
    };
    write()
        .map_err(io::Error::from)
        .map_err(output("write the picture"))
}

fn drawn(grid: &Grid, title: &str) -> Canvas {
    let (columns, rows) = (grid.width() as u32, grid.height() as u32);
    let pixels = (LEAST_WIDTH / columns).max(1);
    let map = Size::new(columns * pixels, rows * pixels);
    let (left, top) = (MARGIN + LABEL, MARGIN + LINE);
    let width = left + map.width.max(LEAST_WIDTH) + MARGIN;
    let mut canvas = Canvas::new(Size::new(width, top + map.height + MARGIN + 4 * LINE));
    canvas.write(MARGIN, MARGIN, title);
    // An address wherever there is room for one.
    let label_every = LINE.div_ceil(pixels).next_power_of_two();
    for row in 0..rows {
        let y = top + row * pixels;
        if row % label_every == 0 {
            let address = format!("{:>#18x}", grid.row_start(row as usize));
            canvas.write(MARGIN, y, &address);
        }
        for column in 0..columns {
            let colour = colour_of(grid.cell(column as usize, row as usize));
            canvas.fill(left + column * pixels, y, Size::new(pixels, pixels), colour);
        }
    }
    draw_legend(&mut canvas, grid, left, top + map.height + MARGIN);
    canvas
}

fn draw_legend(canvas: &mut Canvas, grid: &Grid, left: u32, top: u32) {
    let swatch = Size::new(GLYPH.height, GLYPH.height);
    let beside = swatch.width + 4;
    let step = beside + 3 * GLYPH.width;
    for tag in Tag::all() {
        let x = left + u32::from(tag.value()) * step;
        canvas.fill(x, top, swatch, tag_colour(tag));
        canvas.write(x + beside, top, &tag.to_string());
    }
    let words = [("never populated", HOLE), ("no memory", NO_MEMORY)];
    let mut x = left;
    for (word, colour) in words {
        canvas.fill(x, top + LINE, swatch, colour);
        canvas.write(x + beside, top + LINE, word);
        x += beside + (word.len() as u32 + 3) * GLYPH.width;
    }
    let scale = format!(
        "a cell is {}, a row {}; its colour is its most frequent tag but 0",
        size_in_words(grid.cell_bytes()),
        size_in_words(grid.row_bytes())
    );
    canvas.write(left, top + 2 * LINE, &scale);
}

/// A power of two in the unit that makes it least.
fn size_in_words(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let unit = bytes.trailing_zeros() / 10;
    format!("{} {}", bytes >> (unit * 10), UNITS[unit as usize])
}
