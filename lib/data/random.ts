/**
 * Random numbers that can be repeated: PyTorch's CPU generator (MT19937), bit for bit, and a hash of counters for
 * draws that no order of execution may change. Nothing here is seeded by the clock, and nothing is for secrets.
 */

const N = 624;
const M = 397;

/** PyTorch's CPU generator (Mersenne Twister, Matsumoto and Nishimura 1998), as `torch.manual_seed(seed)` leaves it. */
export class TorchGenerator {
  readonly #state = new Uint32Array(N);
  #next = N;

  /** Throws a RangeError unless `seed` is a whole number that JavaScript holds exactly and not negative. */
  constructor(seed: number) {
    if (!Number.isSafeInteger(seed) || seed < 0) {
      throw new RangeError(`Cannot seed with ${seed}: the seed must be a whole number from 0 to 2^53 - 1`);
    }
    this.#state[0] = seed % 2 ** 32; // PyTorch keeps the low 32 bits too
    for (let i = 1; i < N; i++) {
      const last = this.#state[i - 1]!;
      this.#state[i] = Math.imul(1812433253, last ^ (last >>> 30)) + i;
    }
  }

  /** The next 32 random bits, as a number from 0 to 2^32 - 1. */
  next32(): number {
    if (this.#next === N) this.#refill();
    let x = this.#state[this.#next++]!;
    x ^= x >>> 11;
    x ^= (x << 7) & 0x9d2c5680;
    x ^= (x << 15) & 0xefc60000;
    x ^= x >>> 18;
    return x >>> 0;
  }

  #refill(): void {
    const s = this.#state;
    for (let i = 0; i < N; i++) {
      const x = (s[i]! & 0x80000000) | (s[(i + 1) % N]! & 0x7fffffff);
      s[i] = s[(i + M) % N]! ^ (x >>> 1) ^ (x & 1 ? 0x9908b0df : 0);
    }
    this.#next = 0;
  }

  /**
   * `count` float32 values as `torch.empty(count).uniform_(lo, hi)` draws them. The bounds become float32 first, and 24
   * bits u of a draw give u · (hi - lo) + lo in one fused multiply-add, which the double expression equals.
   */
  uniform(count: number, lo: number, hi: number): Float32Array {
    const low = Math.fround(lo);
    const range = Math.fround(Math.fround(hi) - low);
    const values = new Float32Array(count);
    for (let i = 0; i < count; i++) values[i] = (this.next32() & 0xffffff) * 2 ** -24 * range + low;
    return values;
  }

  /** The order of 0 … n-1 that `torch.randperm(n)` gives. Throws a RangeError unless n is below 214,748,364. */
  permutation(n: number): Uint32Array {
    // Beyond this PyTorch draws 64 bits at a time: another sequence.
    if (!(Number.isInteger(n) && n >= 0 && n < 214_748_364)) {
      throw new RangeError(`Cannot permute ${n} rows: the number must be whole and below 214748364`);
    }
    const order = Uint32Array.from({ length: n }, (_, i) => i);
    for (let i = 0; i < n - 1; i++) {
      const j = i + this.next32() % (n - i);
      const kept = order[i]!;
      order[i] = order[j]!;
      order[j] = kept;
    }
    return order;
  }
}

/**
 * 32 random bits that depend on nothing but `seed`, `a` and `b` (their low 32 bits): the same on every device and in
 * any order. Each counter is mixed in by the finalizer of MurmurHash3.
 */
export function hash32(seed: number, a: number, b: number): number {
  return mix(b ^ mix(a ^ mix(seed))) >>> 0;
}

function mix(x: number): number {
  x = (x + 0x9e3779b9) | 0; // the finalizer alone would leave 0 at 0
  x = Math.imul(x ^ (x >>> 16), 0x85ebca6b);
  x = Math.imul(x ^ (x >>> 13), 0xc2b2ae35);
  return x ^ (x >>> 16);
}
