-- Asks for /images/i0, /images/i1 … Arguments: zipf or uniform, how many images there are, a seed.
local threads = 0

setup = function(thread)
    -- Threads with the same random numbers would ask for the same images at the same time.
    thread:set("thread_number", threads)
    threads = threads + 1
end

init = function(arguments)
    local kind, count = arguments[1], tonumber(arguments[2])
    math.randomseed(tonumber(arguments[3]) * 1000 + thread_number)
    local requests, reached, sum = {}, {}, 0
    for image = 1, count do
        requests[image] = wrk.format("GET", "/images/i" .. image - 1)
        sum = sum + 1 / image
        reached[image] = sum
    end
    if kind == "uniform" then
        request = function()
            return requests[math.random(count)]
        end
        return
    end
    -- The image in rank r is asked for 1/r times as often as the first.
    request = function()
        local drawn = math.random() * sum
        local low, high = 1, count
        while low < high do
            local middle = math.floor((low + high) / 2)
            if reached[middle] < drawn then
                low = middle + 1
            else
                high = middle
            end
        end
        return requests[low]
    end
end
