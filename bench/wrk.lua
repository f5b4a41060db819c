-- What wrk asks, and what it says at the end. COUNT: how many pages there are; URL is then that of page 0, which ends with
-- 0.html. TAG: hexadecimal digits, which have a run differ from others. SIZE: in bytes.
--   wrk ... -s wrk.lua URL                         always the same request
--   wrk ... -s wrk.lua URL -- unique TAG           URL?x=TAG-1, URL?x=TAG-2, ...: no two requests alike
--   wrk ... -s wrk.lua URL -- files COUNT SEED     URL00000.bin to URL<COUNT - 1>.bin, shuffled, again and again
--   wrk ... -s wrk.lua URL -- mix COUNT TAG        the pages, as browsers ask for them
--   wrk ... -s wrk.lua URL -- missing COUNT TAG    the same, but for pages that do not exist, each time another
--   wrk ... -s wrk.lua URL -- conditional COUNT TAG LINES LINES ...
--                                                  the same, but half of the requests, by chance, have the LINES of
--                                                  their page, and the others validators that no page has
--   wrk ... -s wrk.lua URL -- ranges COUNT TAG SIZE  the same, but for ranges of about 1 KiB of URL, which has SIZE
--   wrk ... -s wrk.lua URL -- bombs SIZE TAG       requests of nearly SIZE in short header fields, never the same

local site = "www.example.org"

local pages = wrk.path:match("^(.*)0%.html$") or "/pages/f"    -- what their paths begin with

local function seed_of(tag)
   return tonumber(tag:sub(1, 8), 16)
end

local function unique(tag)
   local number = 0
   return function()
      number = number + 1
      return wrk.format(nil, wrk.path .. "?x=" .. tag .. "-" .. number)
   end
end

local function files(count, seed)
   local requests, at = {}, 0
   count = tonumber(count)
   for number = 1, count do
      requests[number] = wrk.format(nil, string.format("%s%05d.bin", wrk.path, number - 1))
   end
   math.randomseed(tonumber(seed))
   for last = count, 2, -1 do
      local other = math.random(last)
      requests[last], requests[other] = requests[other], requests[last]
   end
   return function()
      at = at % count + 1
      return requests[at]
   end
end

-- Requests as browsers send them: user agents, referers and cookies differ as they do between visitors, so hardly two are
-- alike. target(page, number): the path that request `number` asks for, where `page` was chosen by chance.
-- add_lines(add, page, number, visitor): adds the lines of its header that depend on what is measured.
local function browsers(count, tag, target, add_lines)
   local format, random = string.format, math.random
   local number, lines = 0, {}
   local function add(...)
      lines[#lines + 1] = format(...)
   end
   local agents = {
      [0] = function(version)
         return format("Mozilla/5.0 (iPhone; CPU iPhone OS 17_%d like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) "
            .. "Version/17.%d Mobile/15E148 Safari/604.1", version % 9, version % 7)
      end,
      function(version)
         return format("Mozilla/5.0 (X11; Linux x86_64; rv:%d.0) Gecko/20100101 Firefox/%d.0", version, version)
      end,
      function(version)
         return format("Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) "
            .. "Chrome/%d.0.0.0 Safari/537.36", version)
      end,
   }
   agents[3] = agents[2]
   count = tonumber(count)
   math.randomseed(seed_of(tag))
   return function()
      number = number + 1
      local visitor, page = random(1, 999999999), random(0, count - 1)
      lines = {
         format("GET %s HTTP/1.1", target(page, number)),
         "Host: " .. site,
         "User-Agent: " .. agents[number % 4](random(90, 130)),
         "Accept: text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8",
         "Accept-Language: en-US,en;q=0.5",
         "Accept-Encoding: gzip, deflate, br, zstd",
      }
      if number % 3 > 0 then
         add("Referer: https://%s%s%d.html", site, pages, random(0, count - 1))
      end
      if number % 2 == 0 then
         add("Cookie: _ga=GA1.1.%d.%d; theme=dark; session=%x", visitor, 1700000000 + visitor % 50000000, visitor)
      end
      add_lines(add, page, number, visitor)
      add("Connection: keep-alive\r\nUpgrade-Insecure-Requests: 1\r\nSec-Fetch-Dest: document\r\n"
         .. "Sec-Fetch-Mode: navigate\r\nSec-Fetch-Site: same-origin\r\nPriority: u=0, i\r\n\r\n")
      return table.concat(lines, "\r\n")
   end
end

local function path_of(page)
   return pages .. page .. ".html"
end

-- Validators that no page has.
local function add_stale(add, visitor)
   add('If-None-Match: "%x"', visitor * 7)
   add("If-Modified-Since: Mon, 23 Nov 2026 0%d:%02d:00 GMT", visitor % 10, visitor % 60)
end

local function add_sometimes_stale(add, _, number, visitor)
   if number % 5 == 0 then
      add_stale(add, visitor)
   end
end

local function mix(count, tag)
   return browsers(count, tag, path_of, add_sometimes_stale)
end

local function missing(count, tag)
   local function target(_, number)
      return pages .. tag .. "-" .. number .. ".html"
   end
   return browsers(count, tag, target, add_sometimes_stale)
end

local function conditional(count, tag, ...)
   local current = {...}
   local function add_validators(add, page, _, visitor)
      if math.random(2) == 1 then
         add("%s", current[page + 1])
      else
         add_stale(add, visitor)
      end
   end
   return browsers(count, tag, path_of, add_validators)
end

local function ranges(count, tag, size)
   local random, longest = math.random, 1536
   local function target()
      return wrk.path
   end
   local function add_range(add, page, number, visitor)
      local first, length = random(0, size - longest), random(512, longest)
      add("Range: bytes=%d-%d", first, first + length - 1)
      add_sometimes_stale(add, page, number, visitor)
   end
   return browsers(count, tag, target, add_range)
end

-- Making a bomb takes longer than answering it: some are made before, and told apart by a number when they are sent.
local function bombs(size, tag)
   local format, random = string.format, math.random
   local ready, number, fields = {}, 0, {}
   math.randomseed(seed_of(tag))
   for bomb = 1, 300 do
      for field = 1, (size - 200) / 17 do
         fields[field] = format("x%05x: %07x\r\n", random(0, 0xfffff), random(0, 0xfffffff))
      end
      ready[bomb] = table.concat(fields) .. "\r\n"
   end
   return function()
      number = number + 1
      return format("GET %s HTTP/1.1\r\nHost: %s\r\nx-number: %s-%d\r\n", wrk.path, site, tag, number)
         .. ready[number % #ready + 1]
   end
end

local modes = {unique = unique, files = files, mix = mix, missing = missing, conditional = conditional, ranges = ranges,
   bombs = bombs}

-- wrk sends one ready request over and over, at less cost, unless a global "request" exists.
function init(args)
   if args[1] then
      request = assert(modes[args[1]], "no such mode")(unpack(args, 2))
   end
end

function done(summary)
   local errors = summary.errors
   io.write(string.format(
      '\nsummary {"requests": %d, "bytes": %d, "seconds": %.6f, "errors": '
         .. '{"connect": %d, "read": %d, "write": %d, "status": %d, "timeout": %d}}\n',
      summary.requests, summary.bytes, summary.duration / 1e6,
      errors.connect, errors.read, errors.write, errors.status, errors.timeout))
end
