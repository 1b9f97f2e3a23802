//! What there is to see in 64 granules: where spans begin, and the tags there. On aarch64 and x86-64 in instructions that compilers do not
//! find by themselves; a loop over bytes elsewhere, which says the same.

/// Bytes looked at at a time: so many that their granules are the bits of a word.
pub(crate) const WORD: usize = 32;
/// Their granules.
pub(crate) const WORD_GRANULES: usize = 2 * WORD;

/// Of each granule the tag in bits 7:4, and that of the granule before in bits 3:0.
pub(crate) type Keys = [u8; WORD_GRANULES];

/// The packed tags of 64 granules, and the bytes before and behind them, which tell of the granules beside them.
#[derive(Clone, Copy)]
pub(crate) struct Window<'a>(pub(crate) &'a [u8; WORD + 2]);

impl Window<'_> {
    /// Whether any tag differs from the one before it. That is yes too if the bytes are of two tags, one behind the other.
    #[inline(always)]
    pub(crate) fn differs(self) -> bool {
        let (before, these): (&[u8; WORD], &[u8; WORD]) = (self.bytes(0), self.bytes(1));
        let last = these[WORD - 1];
        (before != these) | (last != last.rotate_left(4))
    }

    /// The granules at which spans begin, the first in bit 0. Fills in the keys of all.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    #[allow(unsafe_code)]
    pub(crate) fn look(self, keys: &mut Keys) -> u64 {
        // SAFETY: it needs SSE2, which every x86-64 CPU has, and nothing else.
        unsafe { sse2::look(self, keys) }
    }

    /// The granules at which spans begin, the first in bit 0. Fills in the keys of all.
    #[cfg(target_arch = "aarch64")]
    #[inline(always)]
    #[allow(unsafe_code)]
    pub(crate) fn look(self, keys: &mut Keys) -> u64 {
        // SAFETY: it needs Advanced SIMD, which this target has, and nothing else.
        unsafe { neon::look(self, keys) }
    }

    /// The granules at which spans begin, the first in bit 0. Fills in the keys of all.
    #[cfg(not(any(target_arch = "aarch64", target_arch = "x86_64")))]
    #[inline(always)]
    pub(crate) fn look(self, keys: &mut Keys) -> u64 {
        anywhere::look(self, keys)
    }

    #[inline(always)]
    fn bytes<const N: usize>(&self, at: usize) -> &[u8; N] {
        let bytes = self.0[at..].first_chunk();
        bytes.expect("they are inside")
    }
}

#[cfg(target_arch = "x86_64")]
mod sse2 {
    use core::arch::x86_64::{
        __m128i, _mm_and_si128, _mm_andnot_si128, _mm_cmpeq_epi8, _mm_cvtsi128_si64,
        _mm_movemask_epi8, _mm_or_si128, _mm_set_epi64x, _mm_set1_epi8, _mm_setzero_si128,
        _mm_slli_epi16, _mm_srli_epi16, _mm_unpackhi_epi8, _mm_unpackhi_epi64, _mm_unpacklo_epi8,
    };

    use super::{Keys, Window};

    #[inline]
    #[target_feature(enable = "sse2")]
    pub(super) fn look(window: Window<'_>, keys: &mut Keys) -> u64 {
        let mut begins = 0;
        for (half, keys) in keys.as_chunks_mut().0.iter_mut().enumerate() {
            begins |= u64::from(look_32(window, 16 * half, keys)) << (32 * half);
        }
        begins
    }

    #[inline]
    #[target_feature(enable = "sse2")]
    fn look_32(window: Window<'_>, at: usize, keys: &mut [u8; 32]) -> u32 {
        let nibble = _mm_set1_epi8(0xf);
        let zero = _mm_setzero_si128();
        let these = load(window.bytes(at + 1));
        let before = _mm_and_si128(_mm_srli_epi16::<4>(load(window.bytes(at))), nibble);
        let low = _mm_and_si128(these, nibble);
        let high = _mm_and_si128(_mm_srli_epi16::<4>(these), nibble);
        let after = _mm_and_si128(load(window.bytes(at + 2)), nibble);

        let low_keys = _mm_or_si128(_mm_slli_epi16::<4>(low), before);
        store(
            _mm_unpacklo_epi8(low_keys, these),
            &mut keys.as_chunks_mut().0[0],
        );
        store(
            _mm_unpackhi_epi8(low_keys, these),
            &mut keys.as_chunks_mut().0[1],
        );

        let low_as_before = _mm_cmpeq_epi8(low, before);
        let high_as_low = _mm_cmpeq_epi8(high, low);
        let after_as_high = _mm_cmpeq_epi8(after, high);
        let low_is_gap = _mm_andnot_si128(high_as_low, _mm_cmpeq_epi8(low, zero));
        let high_is_gap = _mm_andnot_si128(after_as_high, _mm_cmpeq_epi8(high, zero));
        let low_goes_on = _mm_or_si128(low_as_before, low_is_gap);
        let high_goes_on = _mm_or_si128(high_as_low, high_is_gap);
        let first = _mm_movemask_epi8(_mm_unpacklo_epi8(low_goes_on, high_goes_on));
        let second = _mm_movemask_epi8(_mm_unpackhi_epi8(low_goes_on, high_goes_on));
        !(first as u32 | (second as u32) << 16)
    }

    #[inline]
    #[target_feature(enable = "sse2")]
    fn load(bytes: &[u8; 16]) -> __m128i {
        let word = u128::from_le_bytes(*bytes);
        _mm_set_epi64x((word >> 64) as i64, word as i64)
    }

    #[inline]
    #[target_feature(enable = "sse2")]
    fn store(bytes: __m128i, to: &mut [u8; 16]) {
        let low = _mm_cvtsi128_si64(bytes) as u64;
        let high = _mm_cvtsi128_si64(_mm_unpackhi_epi64(bytes, bytes)) as u64;
        *to = (u128::from(low) | u128::from(high) << 64).to_le_bytes();
    }
}

#[cfg(target_arch = "aarch64")]
mod neon {
    use core::arch::aarch64::{
        uint8x16_t, vandq_u8, vbicq_u8, vceqq_u8, vceqzq_u8, vcombine_u8, vcreate_u8, vdupq_n_u8,
        vgetq_lane_u64, vmvnq_u8, vorrq_u8, vpaddq_u8, vreinterpretq_u64_u8, vshrq_n_u8,
        vsliq_n_u8, vzip1q_u8, vzip2q_u8,
    };

    use super::{Keys, Window};

    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn look(window: Window<'_>, keys: &mut Keys) -> u64 {
        let [first, second] = keys.as_chunks_mut().0 else {
            unreachable!("64 are twice 32")
        };
        let (a, b) = look_32(window, 0, first);
        let (c, d) = look_32(window, 16, second);
        let bits = vpaddq_u8(vpaddq_u8(a, b), vpaddq_u8(c, d));
        vgetq_lane_u64::<0>(vreinterpretq_u64_u8(vpaddq_u8(bits, bits)))
    }

    /// Where spans begin among 32 granules: each has a bit of its own among eight, or none.
    #[inline]
    #[target_feature(enable = "neon")]
    fn look_32(window: Window<'_>, at: usize, keys: &mut [u8; 32]) -> (uint8x16_t, uint8x16_t) {
        let nibble = vdupq_n_u8(0xf);
        let these = load(window.bytes(at + 1));
        let before = vshrq_n_u8::<4>(load(window.bytes(at)));
        let low = vandq_u8(these, nibble);
        let high = vshrq_n_u8::<4>(these);
        let after = vandq_u8(load(window.bytes(at + 2)), nibble);

        let low_keys = vsliq_n_u8::<4>(before, low);
        let (first, second) = keys.split_at_mut(16);
        store(vzip1q_u8(low_keys, these), first);
        store(vzip2q_u8(low_keys, these), second);

        let low_as_before = vceqq_u8(low, before);
        let high_as_low = vceqq_u8(high, low);
        let after_as_high = vceqq_u8(after, high);
        let low_is_gap = vbicq_u8(vceqzq_u8(low), high_as_low);
        let high_is_gap = vbicq_u8(vceqzq_u8(high), after_as_high);
        let low_begins = vmvnq_u8(vorrq_u8(low_as_before, low_is_gap));
        let high_begins = vmvnq_u8(vorrq_u8(high_as_low, high_is_gap));

        let each = vcreate_u8(0x8040_2010_0804_0201);
        let each = vcombine_u8(each, each);
        (
            vandq_u8(vzip1q_u8(low_begins, high_begins), each),
            vandq_u8(vzip2q_u8(low_begins, high_begins), each),
        )
    }

    #[inline]
    #[target_feature(enable = "neon")]
    fn load(bytes: &[u8; 16]) -> uint8x16_t {
        let word = u128::from_le_bytes(*bytes);
        vcombine_u8(vcreate_u8(word as u64), vcreate_u8((word >> 64) as u64))
    }

    #[inline]
    #[target_feature(enable = "neon")]
    fn store(bytes: uint8x16_t, to: &mut [u8]) {
        let words = vreinterpretq_u64_u8(bytes);
        let (low, high) = (vgetq_lane_u64::<0>(words), vgetq_lane_u64::<1>(words));
        to.copy_from_slice(&(u128::from(low) | u128::from(high) << 64).to_le_bytes());
    }
}

#[cfg(any(test, not(any(target_arch = "aarch64", target_arch = "x86_64"))))]
mod anywhere {
    use super::{Keys, WORD, Window};

    #[inline(always)]
    pub(super) fn look(window: Window<'_>, keys: &mut Keys) -> u64 {
        let (before, these, after): (&[u8; WORD], &[u8; WORD], &[u8; WORD]) =
            (window.bytes(0), window.bytes(1), window.bytes(2));
        let low_keys: [u8; WORD] = core::array::from_fn(|i| these[i] << 4 | before[i] >> 4);
        for (pair, keys) in keys
            .as_chunks_mut()
            .0
            .iter_mut()
            .zip(low_keys.iter().zip(these))
        {
            *pair = [*keys.0, *keys.1];
        }
        gather(&core::array::from_fn(|i| {
            begins_of_pair(before[i], these[i], after[i])
        }))
    }

    /// Whether spans begin at the two granules of a byte, in bits 0 and 1.
    #[inline(always)]
    fn begins_of_pair(before: u8, byte: u8, after: u8) -> u8 {
        let low_as_before = mask((byte ^ before >> 4) & 0xf == 0);
        let high_as_low = mask((byte ^ byte << 4) & 0xf0 == 0);
        let after_as_high = mask((byte ^ after << 4) & 0xf0 == 0);
        let low_is_gap = mask(byte & 0xf == 0) & !high_as_low;
        let high_is_gap = mask(byte & 0xf0 == 0) & !after_as_high;
        (!(low_as_before | low_is_gap) & 1) | (!(high_as_low | high_is_gap) & 2)
    }

    #[inline(always)]
    const fn mask(condition: bool) -> u8 {
        if condition { 0xff } else { 0 }
    }

    /// Two bits a byte, side by side.
    #[inline(always)]
    fn gather(pairs: &[u8; WORD]) -> u64 {
        let mut fours = [0; WORD / 2];
        for (four, pairs) in fours.iter_mut().zip(pairs.as_chunks().0) {
            let pairs = u16::from_le_bytes(*pairs);
            *four = (pairs | pairs >> 6) as u8 & 0xf;
        }
        let mut eights = [0; WORD / 4];
        for (eight, fours) in eights.iter_mut().zip(fours.as_chunks().0) {
            let fours = u16::from_le_bytes(*fours);
            *eight = (fours | fours >> 4) as u8;
        }
        u64::from_le_bytes(eights)
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use proptest::prelude::*;

    use super::*;

    /// Granules of few tags, so that many are like the ones beside them.
    fn any_window() -> impl Strategy<Value = [u8; WORD + 2]> {
        let tag = || prop_oneof![Just(0u8), Just(0), Just(7), Just(8), 0u8..16];
        let byte = (tag(), tag()).prop_map(|(low, high)| low | high << 4);
        let run = (prop_oneof![byte, any::<u8>()], 1usize..12);
        proptest::collection::vec(run, WORD + 2).prop_map(|runs| {
            let bytes = runs.into_iter();
            let mut bytes = bytes.flat_map(|(byte, length)| std::iter::repeat_n(byte, length));
            std::array::from_fn(|_| bytes.next().expect("a run has a byte"))
        })
    }

    fn granule(window: &[u8; WORD + 2], nth: usize) -> u8 {
        window[nth / 2] >> (4 * (nth % 2)) & 0xf
    }

    proptest! {
        #[test]
        fn spans_begin_where_tags_differ_but_at_lone_granules_of_tag_0(window in any_window()) {
            let mut keys = [0; WORD_GRANULES];
            let begins = Window(&window).look(&mut keys);
            for (nth, key) in keys.into_iter().enumerate() {
                let [before, this, after] = [1, 2, 3].map(|beside| granule(&window, nth + beside));
                let gap = this == 0 && after != 0;
                prop_assert_eq!(begins >> nth & 1 == 1, this != before && !gap);
                prop_assert_eq!(key, this << 4 | before);
            }
        }

        #[test]
        fn every_target_sees_the_same(window in any_window()) {
            let window = Window(&window);
            let (mut keys, mut keys_anywhere) = ([0; WORD_GRANULES], [0; WORD_GRANULES]);
            prop_assert_eq!(window.look(&mut keys), anywhere::look(window, &mut keys_anywhere));
            prop_assert_eq!(keys, keys_anywhere);
        }

        #[test]
        fn where_a_span_begins_a_tag_differs(window in any_window()) {
            let begins = Window(&window).look(&mut [0; WORD_GRANULES]);
            prop_assert!(begins == 0 || Window(&window).differs());
        }
    }
}
