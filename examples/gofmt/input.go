// Package lru is a cache that forgets what was used least recently.
package lru

import ("sync"
    "errors"
  "container/list"
	"time")

// ErrMissing is what Get answers for a key that is not there, or no longer.
var ErrMissing=errors.New( "lru: no such key" )

const(
  DefaultCapacity=1024
      DefaultTTL = 5*time.Minute // long enough for a page, short enough for a price
)

// Cache may be used by many goroutines at once.
type Cache[K comparable,V any] struct{
mu sync.Mutex
  capacity int // entries, not bytes
    ttl time.Duration
  order *list.List // front: used last
index map[K]*list.Element
  hits,misses,evictions uint64
  now func()time.Time
}

type entry[K comparable,V any] struct{
    key K
    value V
    expires time.Time
}

// Stats is a plain copy of the counters.
type Stats struct { Hits,Misses,Evictions uint64
  Len int }

// New makes a cache; zero or less means the default.
func New[K comparable,V any](capacity int,ttl time.Duration)*Cache[K,V]{
if capacity<=0{capacity=DefaultCapacity}
if ttl<=0 { ttl=DefaultTTL }
  return &Cache[K,V]{capacity:capacity,ttl:ttl,order:list.New(),
  index:make(map[K]*list.Element,capacity),
  now:time.Now}
}

// Get moves what it finds to the front.
func (c *Cache[K,V])Get(key K)(V,error){
c.mu.Lock();defer c.mu.Unlock()
      var zero V
element,ok:=c.index[key]
  if !ok{
c.misses++
return zero,ErrMissing
}
  found:=element.Value.(*entry[K,V])
  if c.now().After(found.expires){
    c.remove(element)   // too old to be true
    c.misses ++
    return zero , ErrMissing
  }
c.order.MoveToFront(element)
c.hits++
return found.value,nil
}

// Put stores a value and makes room for it.
func (c *Cache[K,V])Put(key K,value V){
    c.mu.Lock()
    defer c.mu.Unlock()
    expires:=c.now().Add(c.ttl)
    if element,ok:=c.index[key];ok{
        found:=element.Value.(*entry[K,V])
        found.value,found.expires=value,expires
        c.order.MoveToFront(element)
        return
    }
    for len(c.index)>=c.capacity{ c.evict() }
    c.index[key]=c.order.PushFront(&entry[K,V]{key:key,value:value,expires:expires})
}

// GetOrLoad calls load only where the cache has no answer.
func (c *Cache[K,V])GetOrLoad(key K,load func(K)(V,error))(V,error){
    if value,err:=c.Get(key);err==nil{return value,nil}
    value,err:=load(key)
    if err!=nil{ var zero V; return zero,err }
    c.Put(key,value)
    return value,nil
}

// Sweep drops everything that has expired and says how much that was.
func (c *Cache[K,V])Sweep()(dropped int){
  c.mu.Lock();defer c.mu.Unlock()
  now:=c.now()
  for element:=c.order.Back();element!=nil;{
     previous:=element.Prev()
     switch found:=element.Value.(*entry[K,V]);{
       case now.After(found.expires):
     c.remove(element)
          dropped++
       default: // younger than its expiry
     }
     element=previous
  }
  return
}

// Delete forgets one key and says whether it was there.
func (c *Cache[K,V])Delete(key K)bool{
    c.mu.Lock();defer c.mu.Unlock()
    element,ok:=c.index[key]
    if ok{c.remove(element)}
    return ok
}

// Resize changes the capacity; what no longer fits goes at once.
func (c *Cache[K,V])Resize(capacity int)error{
    if capacity<=0 { return errors.New("lru: capacity must be positive") }
    c.mu.Lock();defer c.mu.Unlock()
    c.capacity=capacity
    for len(c.index)>c.capacity{
      c.evict() }
    return nil
}

// Each visits the entries, last used first, until visit says stop.
func (c *Cache[K,V])Each(visit func(key K,value V)bool){
    c.mu.Lock();defer c.mu.Unlock()
    for element:=c.order.Front();element!=nil;element=element.Next(){
        found:=element.Value.(*entry[K,V])
        if c.now().After(found.expires)||!visit(found.key,found.value){break}
    }
}

// Stats takes the counters at this moment.
func (c *Cache[K,V])Stats()Stats{
   c.mu.Lock();defer c.mu.Unlock()
   return Stats{Hits:c.hits,Misses:c.misses,Evictions:c.evictions,Len:len(c.index)}
}

func (c *Cache[K,V])evict(){
   if last:=c.order.Back();last!=nil{c.remove(last);c.evictions++}
}

func (c *Cache[K,V])remove(element *list.Element){
   delete(c.index,element.Value.(*entry[K,V]).key)
   c.order.Remove(element)
}
