//! The random numbers of Python's `random.Random`, so that a seed names the same text here and in
//! `train/data.py`: Mersenne Twister (Matsumoto and Nishimura, 1998), seeded from a string through
//! SHA-512, and the drawing rules of `choice`, `randint`, `sample` and `random`.

/// Words of the twister's state.
const N: usize = 624;
/// Distance of the word each step mixes in.
const M: usize = 397;

/// A stream of random numbers.
pub struct Random {
    state: [u32; N],
    next: usize,
}

impl Random {
    /// The stream of `random.Random(seed)` for a string seed.
    pub fn new(seed: &str) -> Random {
        // The key is the number whose big-endian bytes are the text and then its digest, cut into
        // words from the low end.
        let mut bytes = seed.as_bytes().to_vec();
        bytes.extend_from_slice(&sha512(seed.as_bytes()));
        let mut key: Vec<u32> = bytes
            .rchunks(4)
            .map(|c| c.iter().fold(0, |n, &b| n << 8 | u32::from(b)))
            .collect();
        while key.len() > 1 && key.last() == Some(&0) {
            key.pop();
        }
        Random::from_key(&key)
    }

    /// The generator's own seeding by an array of words.
    fn from_key(key: &[u32]) -> Random {
        let mut s = [0u32; N];
        s[0] = 19_650_218;
        for i in 1..N {
            s[i] = (s[i - 1] ^ (s[i - 1] >> 30))
                .wrapping_mul(1_812_433_253)
                .wrapping_add(i as u32);
        }
        let (mut i, mut j) = (1, 0);
        for _ in 0..N.max(key.len()) {
            s[i] = (s[i] ^ (s[i - 1] ^ (s[i - 1] >> 30)).wrapping_mul(1_664_525))
                .wrapping_add(key[j])
                .wrapping_add(j as u32);
            i += 1;
            j = (j + 1) % key.len();
            if i == N {
                s[0] = s[N - 1];
                i = 1;
            }
        }
        for _ in 0..N - 1 {
            s[i] = (s[i] ^ (s[i - 1] ^ (s[i - 1] >> 30)).wrapping_mul(1_566_083_941))
                .wrapping_sub(i as u32);
            i += 1;
            if i == N {
                s[0] = s[N - 1];
                i = 1;
            }
        }
        s[0] = 0x8000_0000;
        Random { state: s, next: N }
    }

    /// The next 32 bits.
    fn word(&mut self) -> u32 {
        if self.next == N {
            for i in 0..N {
                let y = self.state[i] & 0x8000_0000 | self.state[(i + 1) % N] & 0x7fff_ffff;
                let odd = if y & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[i] = self.state[(i + M) % N] ^ (y >> 1) ^ odd;
            }
            self.next = 0;
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// A number in `[0, 1)` with 53 random bits.
    pub fn random(&mut self) -> f64 {
        let (a, b) = (self.word() >> 5, self.word() >> 6);
        (f64::from(a) * 67_108_864.0 + f64::from(b)) / 9_007_199_254_740_992.0
    }

    /// A number in `0..n`; `n` must be positive and below 2^32.
    pub fn below(&mut self, n: usize) -> usize {
        assert!(n > 0 && u32::try_from(n).is_ok(), "below({n})");
        let bits = usize::BITS - n.leading_zeros();
        loop {
            let r = (self.word() >> (32 - bits)) as usize;
            if r < n {
                return r;
            }
        }
    }

    /// A number in `low..=high`.
    pub fn between(&mut self, low: usize, high: usize) -> usize {
        low + self.below(high - low + 1)
    }

    /// One of `items`, which must not be empty.
    pub fn choice<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }

    /// `k` different ones of `items` in random order; `k` at most their number.
    pub fn sample<T: Clone>(&mut self, items: &[T], k: usize) -> Vec<T> {
        let n = items.len();
        assert!(k <= n, "sample of {k} out of {n}");
        // Python draws from a shrinking pool, or, where the pool would be much larger than the
        // sample, draws again what it already has.
        let mut small = 21;
        if k > 5 {
            small += 4usize.pow(((k * 3) as f64).log(4.0).ceil() as u32);
        }
        if n <= small {
            let mut pool: Vec<usize> = (0..n).collect();
            (0..k)
                .map(|i| {
                    let j = self.below(n - i);
                    let chosen = pool[j];
                    pool[j] = pool[n - i - 1];
                    items[chosen].clone()
                })
                .collect()
        } else {
            let mut taken = vec![false; n];
            (0..k)
                .map(|_| {
                    let mut j = self.below(n);
                    while taken[j] {
                        j = self.below(n);
                    }
                    taken[j] = true;
                    items[j].clone()
                })
                .collect()
        }
    }
}

/// First 64 bits of the fractions of the cube roots of the first 80 primes.
#[rustfmt::skip]
const ROUND: [u64; 80] = [
    0x428a_2f98_d728_ae22, 0x7137_4491_23ef_65cd, 0xb5c0_fbcf_ec4d_3b2f, 0xe9b5_dba5_8189_dbbc,
    0x3956_c25b_f348_b538, 0x59f1_11f1_b605_d019, 0x923f_82a4_af19_4f9b, 0xab1c_5ed5_da6d_8118,
    0xd807_aa98_a303_0242, 0x1283_5b01_4570_6fbe, 0x2431_85be_4ee4_b28c, 0x550c_7dc3_d5ff_b4e2,
    0x72be_5d74_f27b_896f, 0x80de_b1fe_3b16_96b1, 0x9bdc_06a7_25c7_1235, 0xc19b_f174_cf69_2694,
    0xe49b_69c1_9ef1_4ad2, 0xefbe_4786_384f_25e3, 0x0fc1_9dc6_8b8c_d5b5, 0x240c_a1cc_77ac_9c65,
    0x2de9_2c6f_592b_0275, 0x4a74_84aa_6ea6_e483, 0x5cb0_a9dc_bd41_fbd4, 0x76f9_88da_8311_53b5,
    0x983e_5152_ee66_dfab, 0xa831_c66d_2db4_3210, 0xb003_27c8_98fb_213f, 0xbf59_7fc7_beef_0ee4,
    0xc6e0_0bf3_3da8_8fc2, 0xd5a7_9147_930a_a725, 0x06ca_6351_e003_826f, 0x1429_2967_0a0e_6e70,
    0x27b7_0a85_46d2_2ffc, 0x2e1b_2138_5c26_c926, 0x4d2c_6dfc_5ac4_2aed, 0x5338_0d13_9d95_b3df,
    0x650a_7354_8baf_63de, 0x766a_0abb_3c77_b2a8, 0x81c2_c92e_47ed_aee6, 0x9272_2c85_1482_353b,
    0xa2bf_e8a1_4cf1_0364, 0xa81a_664b_bc42_3001, 0xc24b_8b70_d0f8_9791, 0xc76c_51a3_0654_be30,
    0xd192_e819_d6ef_5218, 0xd699_0624_5565_a910, 0xf40e_3585_5771_202a, 0x106a_a070_32bb_d1b8,
    0x19a4_c116_b8d2_d0c8, 0x1e37_6c08_5141_ab53, 0x2748_774c_df8e_eb99, 0x34b0_bcb5_e19b_48a8,
    0x391c_0cb3_c5c9_5a63, 0x4ed8_aa4a_e341_8acb, 0x5b9c_ca4f_7763_e373, 0x682e_6ff3_d6b2_b8a3,
    0x748f_82ee_5def_b2fc, 0x78a5_636f_4317_2f60, 0x84c8_7814_a1f0_ab72, 0x8cc7_0208_1a64_39ec,
    0x90be_fffa_2363_1e28, 0xa450_6ceb_de82_bde9, 0xbef9_a3f7_b2c6_7915, 0xc671_78f2_e372_532b,
    0xca27_3ece_ea26_619c, 0xd186_b8c7_21c0_c207, 0xeada_7dd6_cde0_eb1e, 0xf57d_4f7f_ee6e_d178,
    0x06f0_67aa_7217_6fba, 0x0a63_7dc5_a2c8_98a6, 0x113f_9804_bef9_0dae, 0x1b71_0b35_131c_471b,
    0x28db_77f5_2304_7d84, 0x32ca_ab7b_40c7_2493, 0x3c9e_be0a_15c9_bebc, 0x431d_67c4_9c10_0d4c,
    0x4cc5_d4be_cb3e_42b6, 0x597f_299c_fc65_7e2a, 0x5fcb_6fab_3ad6_faec, 0x6c44_198c_4a47_5817,
];

/// First 64 bits of the fractions of the square roots of the first 8 primes.
#[rustfmt::skip]
const START: [u64; 8] = [
    0x6a09_e667_f3bc_c908, 0xbb67_ae85_84ca_a73b, 0x3c6e_f372_fe94_f82b, 0xa54f_f53a_5f1d_36f1,
    0x510e_527f_ade6_82d1, 0x9b05_688c_2b3e_6c1f, 0x1f83_d9ab_fb41_bd6b, 0x5be0_cd19_137e_2179,
];

/// SHA-512 (FIPS 180-4).
fn sha512(text: &[u8]) -> [u8; 64] {
    let mut bytes = text.to_vec();
    bytes.push(0x80);
    while bytes.len() % 128 != 112 {
        bytes.push(0);
    }
    bytes.extend_from_slice(&(text.len() as u128 * 8).to_be_bytes());
    let mut hash = START;
    for block in bytes.chunks_exact(128) {
        let mut w = [0u64; 80];
        for (w, b) in w.iter_mut().zip(block.chunks_exact(8)) {
            *w = b.iter().fold(0, |n, &b| n << 8 | u64::from(b));
        }
        for t in 16..80 {
            let (x, y) = (w[t - 15], w[t - 2]);
            let s0 = x.rotate_right(1) ^ x.rotate_right(8) ^ (x >> 7);
            let s1 = y.rotate_right(19) ^ y.rotate_right(61) ^ (y >> 6);
            w[t] = (w[t - 16].wrapping_add(s0))
                .wrapping_add(w[t - 7])
                .wrapping_add(s1);
        }
        let mut v = hash;
        for t in 0..80 {
            let [a, b, c, _, e, f, g, h] = v;
            let s1 = e.rotate_right(14) ^ e.rotate_right(18) ^ e.rotate_right(41);
            let t1 = (h.wrapping_add(s1))
                .wrapping_add(e & f ^ !e & g)
                .wrapping_add(ROUND[t])
                .wrapping_add(w[t]);
            let s0 = a.rotate_right(28) ^ a.rotate_right(34) ^ a.rotate_right(39);
            let t2 = s0.wrapping_add(a & b ^ a & c ^ b & c);
            v.rotate_right(1);
            v[0] = t1.wrapping_add(t2);
            v[4] = v[4].wrapping_add(t1);
        }
        for (h, v) in hash.iter_mut().zip(v) {
            *h = h.wrapping_add(v);
        }
    }
    let mut out = [0; 64];
    for (out, h) in out.chunks_exact_mut(8).zip(hash) {
        out.copy_from_slice(&h.to_be_bytes());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }

    #[test]
    fn digests_are_those_of_the_standard() {
        assert!(hex(&sha512(b"abc")).starts_with("ddaf35a193617abacc417349ae204131"));
        let long = [b'a'; 200];
        assert!(hex(&sha512(&long)).ends_with("e6f86e4df7ed1ae6cba71f3e98faee9f"));
        assert!(hex(&sha512(b"")).starts_with("cf83e1357eefb8bdf1542850d66d8007"));
    }

    /// Values printed by Python 3.11's `random.Random("eval:7:3")`, drawn in this order.
    #[test]
    fn draws_are_those_of_python() {
        let mut r = Random::new("eval:7:3");
        let draws = |r: &mut Random, n| (0..n).map(|_| r.below(1000)).collect::<Vec<_>>();
        assert_eq!(draws(&mut r, 5), [226, 770, 770, 238, 456]);
        let xs: Vec<f64> = (0..3).map(|_| r.random()).collect();
        assert_eq!(
            xs,
            [
                0.05653376030175561,
                0.32146676479950953,
                0.10611668735376256
            ]
        );
        let items: Vec<usize> = (0..200).collect();
        assert_eq!(r.sample(&items[..48], 48)[..6], [27, 1, 29, 17, 34, 2]);
        assert_eq!(r.sample(&items[..100], 3), [75, 30, 16]);
        assert_eq!(r.sample(&items, 20)[..5], [157, 32, 179, 72, 36]);
        let xs: Vec<usize> = (0..8).map(|_| r.between(1, 4)).collect();
        assert_eq!(xs, [2, 4, 2, 3, 2, 3, 1, 1]);
        assert_eq!(draws(&mut r, 2000)[1997..], [16, 767, 749]);
    }

    /// A seed longer than the digest's own block, so that the key is longer too.
    #[test]
    fn long_seeds_agree() {
        let mut r = Random::new(&"records ".repeat(400));
        assert_eq!(r.below(1 << 30), 28058095);
    }
}
