//! Colours for tags.
//!
//! Tag 0 is grey and holes are nearly black; the other fifteen are those of Martin Krzywinski's palette for colour-blind
//! readers (<https://mk.bcgsc.ca/colorblind/palettes.mhtml>), with white for its black. A test looks at them as each
//! kind of dichromat does.

use mte::Tag;

use crate::map::Cell;

/// Red, green, blue (sRGB).
pub type Colour = [u8; 3];

/// Memory that was never populated.
pub const HOLE: Colour = [0x20, 0x20, 0x20];
/// No memory.
pub const NO_MEMORY: Colour = [0x00, 0x00, 0x00];

const TAGS: [Colour; Tag::COUNT] = [
    [0x5a, 0x5a, 0x5a],
    [0x00, 0x6d, 0xdb],
    [0xdb, 0x6d, 0x00],
    [0x24, 0xff, 0x24],
    [0xff, 0x6d, 0xb6],
    [0xff, 0xff, 0x6d],
    [0x49, 0x00, 0x92],
    [0x00, 0x92, 0x92],
    [0x92, 0x00, 0x00],
    [0xb6, 0xdb, 0xff],
    [0x92, 0x49, 0x00],
    [0xb6, 0x6d, 0xff],
    [0xff, 0xff, 0xff],
    [0x00, 0x49, 0x49],
    [0xff, 0xb6, 0xdb],
    [0x6d, 0xb6, 0xff],
];

/// The colour of a tag.
pub fn tag_colour(tag: Tag) -> Colour {
    TAGS[usize::from(tag.value())]
}

/// The colour of a cell.
pub fn colour_of(cell: Cell) -> Colour {
    match cell {
        Cell::NoMemory => NO_MEMORY,
        Cell::Hole => HOLE,
        Cell::Tag(tag) => tag_colour(tag),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kinds of dichromats see, in linear light: protanopia, deuteranopia, tritanopia (Machado, Oliveira and
    /// Fernandes, "A Physiologically-based Model for Simulation of Color Vision Deficiency", 2009, severity 1.0).
    const SIGHTS: [[[f64; 3]; 3]; 4] = [
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ],
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ],
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ],
    ];

    fn times(matrix: [[f64; 3]; 3], vector: [f64; 3]) -> [f64; 3] {
        matrix.map(|row| row.iter().zip(vector).map(|(a, b)| a * b).sum())
    }

    /// In Oklab (Björn Ottosson, 2020), whose distances are about those that one sees.
    fn seen(colour: Colour, sight: [[f64; 3]; 3]) -> [f64; 3] {
        let linear = colour.map(|value| (f64::from(value) / 255.0).powf(2.2));
        let [r, g, b] = times(sight, linear).map(|value| value.clamp(0.0, 1.0));
        let cones = times(
            [
                [0.4122214708, 0.5363325363, 0.0514459929],
                [0.2119034982, 0.6806995451, 0.1073969566],
                [0.0883024619, 0.2817188376, 0.6299787005],
            ],
            [r, g, b],
        );
        times(
            [
                [0.2104542553, 0.7936177850, -0.0040720468],
                [1.9779984951, -2.4285922050, 0.4505937099],
                [0.0259040371, 0.7827717662, -0.8086757660],
            ],
            cones.map(f64::cbrt),
        )
    }

    #[test]
    fn every_reader_can_tell_all_colours_apart() {
        let colours: Vec<_> = TAGS.into_iter().chain([HOLE]).collect();
        let mut too_close = Vec::new();
        for (kind, sight) in SIGHTS.into_iter().enumerate() {
            for (i, one) in colours.iter().enumerate() {
                for (j, other) in colours.iter().enumerate().skip(i + 1) {
                    let [one, other] = [seen(*one, sight), seen(*other, sight)];
                    let squares = one.iter().zip(other).map(|(a, b)| (a - b).powi(2));
                    let distance = squares.sum::<f64>().sqrt();
                    too_close.extend((distance < 0.04).then_some((kind, i, j, distance)));
                }
            }
        }
        assert_eq!(too_close, []);
    }
}
