/**
 * Which tokens of which documents share a row: the four packings of TRL, row for row. Works on document lengths alone
 * and never touches tokens; refuses a row length below 1.
 */

/** `bfd` truncates what is too long, `bfd_split` cuts it, `wrapped` ignores borders, `none` gives each document a row. */
export const packings = ["bfd", "bfd_split", "wrapped", "none"] as const;
/** One of {@link packings}. */
export type Packing = (typeof packings)[number];

/** `count` tokens of document number `document` from token `begin` on. */
export interface Slice {
  readonly document: number;
  readonly begin: number;
  readonly count: number;
}

/** How rows are made: at most `maxLength` tokens each. */
export interface PackingOptions {
  readonly packing: Packing;
  readonly maxLength: number;
}

/** Packing starts anew after so many documents: TRL packs inside `datasets.map(batched=True)`, whose batches have this many. */
const GROUP = 1000;

/**
 * Rows of slices for documents of these lengths, in TRL's order (trl/data_utils.py `pack_dataset`); empty documents
 * leave no trace. Throws a RangeError when `maxLength` is not a whole number above 0.
 */
export function packRows(lengths: readonly number[], options: PackingOptions): Slice[][] {
  const { maxLength } = options;
  if (!Number.isInteger(maxLength) || maxLength < 1) {
    throw new RangeError(`Cannot pack rows of ${maxLength} tokens: a whole number above 0 is wanted`);
  }
  const rows: Slice[][] = [];
  for (let start = 0; start < lengths.length; start += GROUP) {
    const documents: Slice[] = [];
    for (let i = start; i < Math.min(start + GROUP, lengths.length); i++) {
      if (lengths[i]! > 0) documents.push({ document: i, begin: 0, count: lengths[i]! });
    }
    for (const row of packGroup(documents, options)) rows.push(row);
  }
  return rows;
}

function packGroup(documents: readonly Slice[], { packing, maxLength }: PackingOptions): Slice[][] {
  if (packing === "wrapped") return wrap(documents, maxLength);
  if (packing === "none") return documents.map((slice) => [head(slice, maxLength)]);
  if (packing === "bfd") return bestFitDecreasing(documents.map((slice) => head(slice, maxLength)), maxLength);
  return bestFitDecreasing(documents.flatMap((slice) => cut(slice, maxLength)), maxLength);
}

/**
 * Longest first (equal lengths in their order), each into the row with the least space that is enough, of these the one
 * that has had this much space the longest. One queue of rows per amount of space makes the search at most `maxLength` steps.
 */
function bestFitDecreasing(pieces: readonly Slice[], maxLength: number): Slice[][] {
  const rows: Slice[][] = [];
  const bySpace = Array.from({ length: maxLength + 1 }, () => ({ rows: [] as Slice[][], taken: 0 }));
  for (const piece of pieces.toSorted((a, b) => b.count - a.count)) {
    let space = piece.count;
    while (space < maxLength && bySpace[space]!.taken === bySpace[space]!.rows.length) space++;
    let row: Slice[];
    if (space < maxLength) {
      const queue = bySpace[space]!;
      row = queue.rows[queue.taken++]!;
    } else rows.push(row = []);
    row.push(piece);
    bySpace[space - piece.count]!.rows.push(row);
  }
  return rows;
}

/** One stream of tokens cut every `maxLength`; only the last row may be short. */
function wrap(documents: readonly Slice[], maxLength: number): Slice[][] {
  const rows: Slice[][] = [];
  let space = 0;
  for (const { document, count } of documents) {
    for (let begin = 0; begin < count;) {
      if (space === 0) {
        rows.push([]);
        space = maxLength;
      }
      const taken = Math.min(count - begin, space);
      rows.at(-1)!.push({ document, begin, count: taken });
      begin += taken;
      space -= taken;
    }
  }
  return rows;
}

function cut({ document, count }: Slice, maxLength: number): Slice[] {
  const pieces: Slice[] = [];
  for (let begin = 0; begin < count; begin += maxLength) {
    pieces.push({ document, begin, count: Math.min(maxLength, count - begin) });
  }
  return pieces;
}

function head({ document, count }: Slice, maxLength: number): Slice {
  return { document, begin: 0, count: Math.min(count, maxLength) };
}
