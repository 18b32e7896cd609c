//! Python's `random.Random`, as far as few-shot sampling needs it: lm-evaluation-harness draws its
//! examples with it, and the same examples make the same prompts.
//!
//! MT19937 (Matsumoto & Nishimura 1998); seeding, `_randbelow` and `sample` as in CPython 3.

const N: usize = 624;
const M: usize = 397;

#[derive(Debug, Clone)]
pub struct PythonRandom {
    state: [u32; N],
    index: usize,
}

impl PythonRandom {
    /// `random.Random(seed)` for a seed of one 32-bit word.
    pub fn new(seed: u32) -> Self {
        let mut random = Self {
            state: [0; N],
            index: N,
        };
        random.by_array(&[seed]);
        random
    }

    fn by_number(&mut self, seed: u32) {
        self.state[0] = seed;
        for i in 1..N {
            let last = self.state[i - 1];
            self.state[i] = 1_812_433_253u32
                .wrapping_mul(last ^ (last >> 30))
                .wrapping_add(i as u32);
        }
    }

    fn by_array(&mut self, key: &[u32]) {
        self.by_number(19_650_218);
        let (mut i, mut j) = (1, 0);
        for _ in 0..N.max(key.len()) {
            let last = self.state[i - 1] ^ (self.state[i - 1] >> 30);
            self.state[i] = (self.state[i] ^ last.wrapping_mul(1_664_525))
                .wrapping_add(key[j])
                .wrapping_add(j as u32);
            i += 1;
            j = (j + 1) % key.len();
            if i == N {
                self.state[0] = self.state[N - 1];
                i = 1;
            }
        }
        for _ in 0..N - 1 {
            let last = self.state[i - 1] ^ (self.state[i - 1] >> 30);
            self.state[i] =
                (self.state[i] ^ last.wrapping_mul(1_566_083_941)).wrapping_sub(i as u32);
            i += 1;
            if i == N {
                self.state[0] = self.state[N - 1];
                i = 1;
            }
        }
        self.state[0] = 0x8000_0000;
        self.index = N;
    }

    fn word(&mut self) -> u32 {
        if self.index == N {
            for i in 0..N {
                let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % N] & 0x7FFF_FFFF);
                let twist = if y & 1 == 1 { 0x9908_B0DF } else { 0 };
                self.state[i] = self.state[(i + M) % N] ^ (y >> 1) ^ twist;
            }
            self.index = 0;
        }
        let mut y = self.state[self.index];
        self.index += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9D2C_5680;
        y ^= (y << 15) & 0xEFC6_0000;
        y ^ (y >> 18)
    }

    /// A whole number below `n` (`_randbelow_with_getrandbits`).
    fn below(&mut self, n: usize) -> usize {
        let bits = usize::BITS - n.leading_zeros();
        loop {
            // More than 32 bits are never needed: no dataset has so many documents.
            let drawn = (self.word() >> (32 - bits)) as usize;
            if drawn < n {
                return drawn;
            }
        }
    }

    /// Indices of `random.sample(population, k)` for a population of `n`.
    ///
    /// # Panics
    /// When `k` is above `n`.
    pub fn sample(&mut self, n: usize, k: usize) -> Vec<usize> {
        assert!(k <= n, "{k} of {n}");
        // CPython's choice between a list of all and a set of those taken.
        let mut set_size = 21.0;
        if k > 5 {
            set_size += 4f64.powf(((k * 3) as f64).log(4.0).ceil());
        }
        if n as f64 <= set_size {
            let mut pool: Vec<usize> = (0..n).collect();
            return (0..k)
                .map(|i| {
                    let j = self.below(n - i);
                    let taken = pool[j];
                    pool[j] = pool[n - i - 1];
                    taken
                })
                .collect();
        }
        let mut taken = Vec::with_capacity(k);
        while taken.len() < k {
            let j = self.below(n);
            if !taken.contains(&j) {
                taken.push(j);
            }
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `r = random.Random(1234)`, then the samples one after the other, in CPython 3.11.
    #[test]
    fn samples_are_cpythons() {
        let mut random = PythonRandom::new(1234);
        assert_eq!(random.sample(10, 3), [7, 1, 0]);
        assert_eq!(random.sample(1000, 5), [92, 932, 965, 961, 826]);
        assert_eq!(random.sample(100, 6), [74, 4, 85, 88, 10, 12]);
        assert_eq!(
            random.sample(2251, 25),
            [
                1452, 969, 71, 126, 64, 1417, 1983, 1898, 608, 373, 749, 468, 59, 2060, 1993, 1023,
                264, 2216, 1908, 280, 364, 2109, 188, 1104, 258
            ]
        );
        assert_eq!(random.sample(86, 7), [82, 38, 61, 45, 34, 31, 83]);
        assert_eq!(random.sample(85, 7), [25, 58, 67, 2, 65, 9, 0]);
    }
}
