/** Tests of the packings against the rows of TRL's own packer. Golden rows: fixtures/golden. */
import { assert, assertEquals, assertThrows } from "@std/assert";
import { type Packing, packRows, type Slice } from "../../lib/data/packing.ts";
import { goldenPath } from "../check.ts";

type Row = [document: number, begin: number, count: number][];
type Case = { readonly max_length: number; readonly document_lengths: readonly number[] } & Record<Packing, Row[]>;

const plain = (rows: readonly (readonly Slice[])[]) =>
  rows.map((row): Row => row.map(({ document, begin, count }) => [document, begin, count]));

for (const config of ["tiny", "odd"]) {
  const golden: Record<string, Case | string> = JSON.parse(Deno.readTextFileSync(goldenPath(`${config}/packing.json`)));
  for (const [name, made] of Object.entries(golden)) {
    if (typeof made === "string") continue; // the file's own description
    for (const packing of ["bfd", "bfd_split", "wrapped"] as const) {
      Deno.test(`packRows() packs ${config} "${name}" by ${packing} into TRL's rows`, () => {
        const rows = packRows(made.document_lengths, { packing, maxLength: made.max_length });
        assertEquals(plain(rows), made[packing]);
      });
    }
  }
}

Deno.test("packRows() by none gives each document a row and cuts its end", () => {
  const rows = packRows([5, 0, 2], { packing: "none", maxLength: 4 });
  assertEquals(plain(rows), [[[0, 0, 4]], [[2, 0, 2]]]);
});

Deno.test("packRows() leaves empty documents out, whatever the packing", () => {
  for (const packing of ["bfd", "bfd_split", "wrapped", "none"] as const) {
    assertEquals(plain(packRows([0, 3, 0], { packing, maxLength: 4 })), [[[1, 0, 3]]]);
    assertEquals(packRows([], { packing, maxLength: 4 }), []);
  }
});

Deno.test("packRows() keeps every token by bfd_split and wrapped, and starts anew after every 1,000 documents", () => {
  const lengths = Array.from({ length: 2500 }, (_, i) => 1 + (i * 37) % 90);
  const total = lengths.reduce((sum, n) => sum + n, 0);
  for (const packing of ["bfd_split", "wrapped"] as const) {
    const rows = packRows(lengths, { packing, maxLength: 64 });
    assertEquals(rows.flat().reduce((sum, { count }) => sum + count, 0), total);
    for (const row of rows) {
      assert(row.reduce((sum, { count }) => sum + count, 0) <= 64);
      assertEquals(new Set(row.map(({ document }) => Math.floor(document / 1000))).size, 1);
    }
  }
});

Deno.test("packRows() packs 50,000 documents into rows that are 99 % full", () => {
  const lengths = Array.from({ length: 50_000 }, (_, i) => 1 + (i * 7919) % 700);
  const rows = packRows(lengths, { packing: "bfd", maxLength: 1024 });
  const full = Math.ceil(lengths.reduce((sum, n) => sum + n, 0) / 1024);
  assert(rows.length >= full && rows.length < full * 1.01);
});

Deno.test("packRows() throws a RangeError for rows without room", () => {
  for (const maxLength of [0, -1, 1.5, NaN]) {
    assertThrows(() => packRows([1], { packing: "bfd", maxLength }), RangeError, "Cannot pack rows of");
  }
});
